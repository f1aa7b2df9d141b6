// Bundles src/ into craton/serve/static/: one script, one style sheet, the page, the icon.
import { copyFileSync, mkdirSync, rmSync } from 'node:fs';
import { build } from 'esbuild';

const out = process.env.CRATON_PAGE ?? '../craton/serve/static';
rmSync(out, { recursive: true, force: true });
mkdirSync(out, { recursive: true });
await build({
  entryPoints: { app: 'src/main.js', style: 'src/style.css' },
  outdir: out,
  bundle: true,
  minify: true,
  format: 'esm',
  target: 'es2022',
  legalComments: 'none',
  charset: 'utf8',
  loader: { '.woff2': 'file' },
  assetNames: '[name]',
  logLevel: 'warning',
});
for (const file of ['index.html', 'icon.svg']) copyFileSync(`src/${file}`, `${out}/${file}`);
