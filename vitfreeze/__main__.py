"""`python -m vitfreeze`, which is also how the deepspeed launcher starts each rank (--module vitfreeze)."""

from vitfreeze.cli import main

if __name__ == "__main__":
    main()
