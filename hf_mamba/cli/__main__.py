"""`python -m hf_mamba.cli` is `hf-mamba`, for machines whose script folder is not on the path."""

from hf_mamba.cli.main import app

if __name__ == "__main__":
    app(prog_name="hf-mamba")
