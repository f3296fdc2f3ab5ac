from tokcredit.cli import main

main()
