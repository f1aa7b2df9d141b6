from craton.cli import main

main()
