"""Image files for the command line, and how it refuses one."""

import io
import re

from PIL import Image

from mnv2_kernels.cli import main as cli


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def assert_cannot_classify(path, sentence, capsys):
    assert cli.main(["classify", str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(rf"mnv2 classify: IMAGE must .*{sentence}.*\n", printed.err), printed.err
    assert str(path) in printed.err
