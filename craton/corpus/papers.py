"""The text of PDF, Word, PowerPoint and Excel documents."""

import logging
import zipfile
from collections.abc import Callable
from typing import Any

from craton.base import UserError, amount

_MOST_COLUMNS, _MOST_BLANK = 1000, 10_000  # of a sheet; what lies behind so many blank rows is left out
_MOST_UNPACKED = 1 << 30  # bytes of an Office document, which is a zip file


def pages_of(kind: str, path: Any, name: str) -> tuple[list[str], list[str]]:
    """The text of each page (slide, sheet; of a Word document the whole), and what is wrong with those that cannot be
    read. path: a file's, or an open one. UserError if it has no text, or cannot be read at all."""
    if kind == "pdf":
        return pdf_pages(path, name)
    _check_size(path, name)
    try:
        return _OFFICE[kind](path, name), []
    except UserError:
        raise
    except Exception as error:  # of many kinds, on files that are damaged in as many ways
        problem = str(error).partition("\n")[0] or type(error).__name__
        what = f"not a readable {_NAMES[kind]} document ({problem}); --skip-bad passes over it"
        raise UserError(f"{name}: {what}") from None


def _check_size(path: Any, name: str) -> None:
    """UserError for a file that unpacks to more than any document."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{name}: not a readable document ({error}); --skip-bad passes over it") from None
    if size > _MOST_UNPACKED:
        most = f"it unpacks to {amount(size, 'B')}, at most {amount(_MOST_UNPACKED, 'B')}"
        raise UserError(f"{name}: {most}; --skip-bad passes over it")
    if hasattr(path, "seek"):
        path.seek(0)


def _docx(path: Any, name: str) -> list[str]:
    return [docx_text(path, name)]


def _pptx(path: Any, name: str) -> list[str]:
    """Text of each slide in the order of its shapes, tables row by row, then its notes."""
    try:
        import pptx
    except ImportError:
        raise UserError(f"{name}: reading PowerPoint needs python-pptx; pip install 'craton[office]'") from None
    return [
        "\n\n".join(t for t in _shapes(slide.shapes) + _notes(slide) if t.strip())
        for slide in pptx.Presentation(path).slides
    ]


def _shapes(shapes: Any) -> list[str]:
    out: list[str] = []
    for shape in shapes:
        if getattr(shape, "shapes", None) is not None:  # a group
            out += _shapes(shape.shapes)
        elif shape.has_text_frame:
            out.append(shape.text_frame.text)
        elif getattr(shape, "has_table", False) and shape.has_table:
            rows = (" | ".join(cell.text for cell in row.cells) for row in shape.table.rows)
            out.append("\n".join(rows))
    return out


def _notes(slide: Any) -> list[str]:
    return [slide.notes_slide.notes_text_frame.text] if slide.has_notes_slide else []


def _xlsx(path: Any, name: str) -> list[str]:
    """Each sheet's rows as they were last computed, cells side by side, its name before the first."""
    try:
        import openpyxl
    except ImportError:
        raise UserError(f"{name}: reading Excel needs openpyxl; pip install 'craton[office]'") from None
    book, out = openpyxl.load_workbook(path, read_only=True, data_only=True), []
    for sheet in book.worksheets:
        lines, blank = [], 0
        for row in sheet.iter_rows(values_only=True, max_col=min(sheet.max_column or _MOST_COLUMNS, _MOST_COLUMNS)):
            cells = ["" if v is None else str(v) for v in row]
            blank = 0 if any(cells) else blank + 1
            if blank > _MOST_BLANK:  # a cell at the sheet's far end would take hours
                break
            if any(cells):
                lines.append(" | ".join(cells).rstrip(" |"))
        out.append(f"{sheet.title}: " + "\n".join(lines) if lines else "")
    book.close()
    return out


_OFFICE: dict[str, Callable[[Any, str], list[str]]] = {"docx": _docx, "pptx": _pptx, "xlsx": _xlsx}
_NAMES = {"docx": "Word", "pptx": "PowerPoint", "xlsx": "Excel"}


def pdf_pages(path: Any, name: str) -> tuple[list[str], list[str]]:
    """The text of each page, and what is wrong with those that cannot be read. UserError if none can, or none has text,
    as scanned pages have."""
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it complains of many files that it reads well
    try:
        reader = pypdf.PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise UserError(f"{name}: a PDF with a password; save it without, or pass --skip-bad to pass over it")
        pages, failed = _page_texts(reader)
    except UserError:
        raise
    except Exception as error:  # of many kinds, on files that are damaged in as many ways
        problem = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{name}: not a readable PDF ({problem}); --skip-bad passes over it") from None
    if failed and not any(page.strip() for page in pages):
        raise UserError(f"{name}: no page of this PDF can be read ({failed[0]}); --skip-bad passes over it")
    if not any(page.strip() for page in pages):
        fix = "run OCR on it first (ocrmypdf), or pass --skip-bad to pass over it"
        raise UserError(f"{name}: a PDF of pictures without text ({len(pages)} pages); {fix}")
    return pages, [f"{name}: {problem}" for problem in failed]


def _page_texts(reader: Any) -> tuple[list[str], list[str]]:
    """The text of each page, '' of one that is damaged; and what is wrong with those."""
    pages, failed = [], []
    for number, page in enumerate(reader.pages, 1):
        try:
            pages.append(page.extract_text())
        except Exception as error:  # of many kinds: a font or an operator that is not as it should be
            pages.append("")
            failed.append(f"page {number} cannot be read ({str(error).partition(chr(10))[0] or type(error).__name__})")
    return pages, failed


def docx_text(path: Any, name: str) -> str:
    """Paragraphs and tables, in order, with tracked insertions and without what was struck out. UserError if it cannot
    be read."""
    try:
        import docx
        from lxml import etree
    except ImportError:
        raise UserError(f"{name}: reading Word documents needs python-docx; pip install 'craton[docx]'") from None
    try:
        part = docx.Document(path if hasattr(path, "read") else str(path)).part
        blocks = _blocks(part.element.body)
        for relation in part.rels.values():
            if relation.reltype.endswith(("/footnotes", "/endnotes")):
                notes = etree.fromstring(relation.target_part.blob)
                blocks += [t for note in notes if not _kind_of_note(note) for t in _blocks(note)]
    except Exception as error:  # of many kinds, on files that are damaged in as many ways
        problem = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{name}: not a readable Word document ({problem}); --skip-bad passes over it") from None
    return "\n\n".join(text for text in blocks if text.strip())


def _kind_of_note(note: Any) -> str:
    """'' of a note; 'separator' and the like of what stands between notes and text."""
    return next((value for key, value in note.attrib.items() if key.endswith("}type")), "")


def _blocks(parent: Any) -> list[str]:
    """The text of each paragraph and table below an element, also of those in content controls."""
    out = []
    for item in parent.iterchildren():
        kind = str(item.tag).rpartition("}")[2]
        if kind == "p":
            out.append(_paragraph(item))
        elif kind == "tbl":
            out.append("\n".join(_row(row) for row in item.iterchildren() if str(row.tag).endswith("}tr")))
        elif kind in ("sdt", "sdtContent", "ins", "moveTo", "customXml", "smartTag"):
            out += _blocks(item)
    return out


def _row(row: Any) -> str:
    cells = [cell for cell in row.iter() if str(cell.tag).endswith("}tc") and _row_of(cell) is row]
    return " | ".join("\n".join(t for t in _blocks(cell) if t.strip()) for cell in cells)


def _row_of(cell: Any) -> Any:
    """The row that a cell is of; there may be a content control between them, or a table within a cell."""
    return next((a for a in cell.iterancestors() if str(a.tag).endswith("}tr")), None)


def _paragraph(paragraph: Any) -> str:
    out: list[str] = []
    _runs(paragraph, out)
    return "".join(out)


def _runs(parent: Any, out: list[str]) -> None:
    """Adds the text below an element. Of alternatives the first counts; what was moved away or struck out does not."""
    for item in parent.iterchildren():
        kind = str(item.tag).rpartition("}")[2]
        if kind == "t":
            out.append(item.text or "")
        elif kind in _CHARACTERS and str(parent.tag).endswith("}r"):
            out.append(_CHARACTERS[kind])
        elif kind == "txbxContent":
            out.append("\n" + "\n".join(text for text in _blocks(item) if text.strip()) + "\n")
        elif kind not in ("Fallback", "moveFrom", "del", "pPr", "rPr"):
            _runs(item, out)


_CHARACTERS = {"tab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "\u2011"}
