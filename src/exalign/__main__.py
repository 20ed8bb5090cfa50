from exalign.cli import main

main()
