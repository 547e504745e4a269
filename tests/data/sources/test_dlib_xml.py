"""Keypoints in dlib's XML format."""

import pytest
import torch

from cnntrain.data.sources.dlib_xml import DlibXml
from cnntrain.errors import UserError

XML = """<?xml version='1.0'?><dataset><images><image file='0.png'>
<box top='5' left='10' width='40' height='20'><part name='00' x='20' y='10'/>
<part name='01' x='40' y='10'/></box>
<box top='5' left='10' width='40' height='20' ignore='1'><part name='00' x='20' y='10'/></box>
</image>
<image file='1.png'><box top='0' left='0' width='60' height='40'>
<part name='01' x='40' y='11'/></box></image>
</images></dataset>"""


def dlib(folder, text: str) -> DlibXml:
    (folder / "train.xml").write_text(text)
    return DlibXml(str(folder), "train.xml", None, None, size=[20, 40], crop_margin=0)


def test_dlib_files(photographs):
    source = dlib(photographs, XML)
    assert source.spec().keypoints == ("00", "01")
    train = source.load()["train"]
    assert train.targets["valid"].tolist() == [[True, True], [False, True]]
    assert torch.allclose(train.targets["points"][0], torch.tensor([[10.0, 5.0], [30.0, 5.0]]))


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("x='20'", "x='many'", "image '0.png' box 1: expected numbers"),
        ("top='5'", "", "expected numbers"),
        ("name='01' x='40' y='10'", "name='00' x='40' y='10'", "once for each part"),
        ("file='1.png'", "file='gone.png'", "image 'gone.png': no such file"),
        ("</dataset>", "", "cannot be read as XML"),
        ("<dataset>", "<!DOCTYPE d [<!ENTITY a 'aaaa'>]><dataset>", "entity declarations"),
        ("part", "spot", "expected <part"),
        ("file='1.png'", f"file='{'a' * 5000}'", "no such file"),
    ],
)
def test_dlib_errors_name_the_box(photographs, old, new, part):
    with pytest.raises(UserError) as caught:
        dlib(photographs, XML.replace(old, new)).spec()
    assert part in str(caught.value)
