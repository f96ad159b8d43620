"""Tables and lists of images that are odd or broken: read rightly, or one line that names the file."""

from __future__ import annotations

import unicodedata

import pytest
from test_broken_data import LIST, PIXELS, SIDE, check, encoded, read, require_refused, write_folder

from ldm.data.kinds import build_kind
from ldm.data.module import DataModuleFromConfig
from ldm.training.cli import run_command

BOM8, NFD = b"\xef\xbb\xbf", unicodedata.normalize("NFD", "bäume.png")
TABLES = {  # content -> texts of b.png, and of bäume.png if it is in the table
    "plain": (b"image,kind\nb.png,bush\nb\xc3\xa4ume.png,tree\n", ["bush"], ["tree"]),
    "semicolons": (b"image;kind;x\nb.png;bush;1\n", ["bush", "1"]),
    "tabs": (b"image\tkind\nb.png\tbush, green\n", ["bush, green"]),
    "byte order mark": (BOM8 + b"image,kind\nb.png,bush\n", ["bush"]),
    "UTF-16": ("image,kind\nb.png,bush\nbäume.png,tree\n".encode("utf-16"), ["bush"], ["tree"]),
    "UTF-16 big endian": (b"\xfe\xff" + "image,kind\nb.png,bush\n".encode("utf-16-be"), ["bush"]),
    "CRLF": (b"image,kind\r\nb.png,bush\r\n", ["bush"]),
    "old Mac": (b"image,kind\rb.png,bush\r", ["bush"]),
    "blank lines": (b"\n  \nimage,kind\n\nb.png,bush\n   \n,\n\n", ["bush"]),
    "trailing spaces": (b" image , kind \n b.png , bush \n", ["bush"]),
    "trailing separators": (b"image,kind,,\nb.png,bush,,\n", ["bush"]),
    "pandas index": (b",image,kind\n0,b.png,bush\n", ["bush"]),
    "pandas index saved twice": (b"Unnamed: 0,image,kind\n0,b.png,bush\n", ["bush"]),
    "index of names": (b",kind\nb.png,bush\n", ["bush"]),
    "dot": (b"image,kind\n./b.png,bush\n", ["bush"]),
    "two dots": (b"image,kind\nsub/../b.png,bush\n", ["bush"]),
    "backslashes": (b"image,kind\n.\\b.png,bush\n", ["bush"]),
    "folder": (b"image,kind\np/b.png,bush\n", ["bush"]),
    "absolute": ("image,kind\n{folder}/b.png,bush\n", ["bush"]),
    "NFD": (f"image,kind\n{NFD},tree\nb.png,bush\n".encode(), ["bush"], ["tree"]),
    "case": (b"image,kind\nB.PNG,bush\n", ["bush"]),
    "no suffix": (b"image,kind\nb,bush\n1,one\n", ["bush"]),
    "names of columns are numbers": (b"image,0,1,2\nb.png,x,y,z\n", ["x", "y", "z"]),
    "quotes": (b'image,kind\n"b.png","bush, ""green"""\n', ['bush, "green"']),
    "text behind quotes": (b'image,kind\nb.png,"red" bush\n', ["red bush"]),
    "quoted line break": (b'image,kind\nb.png,"bush\ngreen"\n', ["bush\ngreen"]),
    "several labels": (b"image,kind\nb.png,a;b\n1.png,c;d\n", ["a;b"]),
    "NaN in numbers": (b"image,kind\nb.png,NaN\n1.png,3\n", [""]),
    "word None": (b"image,kind\nb.png,None\n1.png,hat\n", ["None"]),
    "repeated row": (b"image,kind\nb.png,bush\n./b.png,bush\n", ["bush"]),
    "path column": (b"kind,path\nbush,b.png\n", ["bush"]),
    "object": (b'{"b.png": {"kind": "bush", "x": 1}}', ["bush", "1"]),
    "lists": (b'{"b.png": [true, null, 0.5]}', ["True", "", "0.5"]),
    "one text": (b'{"b.png": "bush"}', ["bush"]),
    "list of objects": (b'[{"image": "b.png", "kind": "bush"}]', ["bush"]),
    "JSON in UTF-16": ('{"b.png": ["bush"]}'.encode("utf-16"), ["bush"]),
}


@pytest.fixture
def pictures(tmp_path):
    folder = write_folder(tmp_path / "p", b__png=encoded(), **{"1__png": encoded()})
    (folder / "bäume.png").write_bytes(encoded())
    return folder


def write_table(folder, content):
    name = "t.json" if content[:1] in (b"{", b"[") or content.startswith("{".encode("utf-16")) else "t.csv"
    (folder.parent / name).write_bytes(content)
    return folder.parent / name


@pytest.mark.parametrize("case", TABLES)
def test_tables_that_are_read(pictures, capsys, tmp_path, case):
    content, *texts = TABLES[case]
    content = content.format(folder=pictures).encode() if isinstance(content, str) else content
    options = {"path": pictures, "attributes": write_table(pictures, content)}
    data = build_kind("folder", options)
    found = dict(zip(data.pictures, data.__getitems__(range(len(data)))["text"]))
    assert [found["b.png"], *([found["bäume.png"]] if len(texts) > 1 else [])] == texts
    assert len(data.pictures) == len(set(data.pictures))
    status, said = check("folder", options, capsys, tmp_path)
    assert status == 0 and "0 problems" in said


BAD_TABLES = {
    "nothing": (b"", "got 0 lines below the header"),
    "header only": (b"image,kind\n", "got 0 lines below the header 'image, kind'"),
    "blank rows": (b"image,kind\n\n,\n  \n", "got 0 lines below the header 'image, kind'"),
    "one column": (b"image\nb.png\n", "expected a header"),
    "no header": (b"b.png,bush\n1.png,one\n", r"line 1: expected a header .* \(b.png\). Add a first line"),
    "short line": (b"image,kind\nb.png,bush\n\n1.png\n", "line 4: expected 2 fields as in the first line, got 1"),
    "unquoted separator": (b"image,kind\nb.png,bush, green\n", "line 2: expected 2 fields .*, got 3"),
    "open quote": (b'image,kind\nb.png,"bush\n', "line 2: expected .* complete quotes|line 3: expected .* quotes"),
    "open quote in the middle": (b'image,kind\nb.png,"bush\n1.png,tree\n', "complete quotes .a quote is not closed"),
    "latin-1": ("image,kind\nbäume.png,tree\n".encode("latin-1"), "line 2: expected text in UTF-8"),
    "zeros": (b"image,kind\nb.png,\x00\x00\n", "line 2: expected text"),
    "picture as a table": (encoded(), "t.csv"),
    "same names": (b"image,kind,kind\nb.png,a,b\n", "columns with different names"),
    "no name": (b"image,kind\n,bush\n", "line 2: expected the path of an image, got an empty cell"),
    "two entries": (b"image,kind\nb.png,bush\n1.png,a\nb.png,tree\n", "line 4: .* 'b.png' again.* than in line 2"),
    "two spellings": (b"image,kind\nb.png,bush\n./b.png,tree\n", "line 3: .* 'b.png' again.* than in line 2"),
    "missing": (b"image,kind\nb.png,bush\nc.png,a\nd.png,a\n", "got 2 that do not exist, such as c.png, d.png"),
    "misspelt": (b"image,kind\nbaume.png,tree\n", "such as baume.png. Did you mean 'bäume.png'"),
    "outside": (b"image,kind\n/etc/b.png,bush\n", "such as /etc/b.png"),
    "other suffix": (b"image,kind\nb.jpg,bush\n", "such as b.jpg"),
    "two separators": (b"image;a,b\nb.png;1,2\n1.png;x,y\n", "both divide the lines"),
    "JSON cut off": (b'{"b.png": ["bush"', "complete JSON"),
    "JSON nested": (b'{"b.png": [["bush"]]}', "for 'b.png', got"),
    "JSON of numbers": (b"[1, 2]", "got a list"),
    "JSON empty": (b"{}", "got an empty one"),
    "JSON without entries": (b'{"b.png": []}', "for 'b.png'"),
    "JSON of several widths": (b'{"b.png": ["a"], "1.png": ["a", "b"]}', "expected 1 attributes for '1.png'"),
    "JSON of other keys": (b'{"b.png": {"a": 1}, "1.png": {"b": 1}}', "the keys a for '1.png'"),
    "JSON with a name twice": (b'{"b.png": ["a"], "b.png": ["b"]}', "'b.png' twice with different entries"),
    "JSON list without names": (b'[{"kind": 3}]', "without the path of an image under 'kind'"),
    "JSON too deep": (b"[" * 100_000, "complete JSON"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_tables_that_are_refused(pictures, capsys, tmp_path, case):
    content, message = BAD_TABLES[case]
    table = write_table(pictures, content)
    require_refused("folder", {"path": pictures, "attributes": table}, table.name, capsys, tmp_path, message)


def test_ambiguous_names_are_refused(pictures, capsys, tmp_path):
    (pictures / "B.png").write_bytes(encoded())
    table = write_table(pictures, b"image,kind\nb.PNG,bush\n")
    require_refused("folder", {"path": pictures, "attributes": table}, "b.PNG", capsys, tmp_path, "do not exist")


def test_rows_and_images_without_a_partner_are_listed(pictures, capsys, tmp_path, caplog):
    table = write_table(pictures, b"image,kind\nb.png,bush\nc.png,a\n")
    options = {"path": pictures, "attributes": table, "damaged": "skip"}
    status, said = check("folder", options, capsys, tmp_path)
    assert status == 0 and "1 (c.png)" in said and "2 (1.png, bäume.png)" in said
    assert "rows without an image were left out: 1 (c.png)" in caplog.text


LISTS = {
    "blank lines": b"\n\np/b.png\n\n\n",
    "byte order mark": BOM8 + b"p/b.png\n",
    "CRLF": b"p/b.png\r\n\r\n",
    "UTF-16": "p/b.png\n".encode("utf-16"),
    "spaces": b"  p/b.png  \n",
    "backslashes": b"p\\b.png\n",
}


@pytest.mark.parametrize("case", LISTS)
def test_lists_that_are_read(pictures, capsys, tmp_path, case):
    (tmp_path / "l.txt").write_bytes(LISTS[case])
    images, _ = read(LIST, {"list_file": tmp_path / "l.txt"})
    assert (images == PIXELS).all() and len(images) == 1
    assert check(LIST, {"list_file": tmp_path / "l.txt"}, capsys, tmp_path)[0] == 0


@pytest.mark.parametrize("content", [b"", b"\n \n", b"p/gone.png\n", b"p\n", b"\xff\x00\xfe", encoded()])
def test_lists_that_are_refused(pictures, capsys, tmp_path, content):
    (tmp_path / "l.txt").write_bytes(content)
    require_refused(LIST, {"list_file": tmp_path / "l.txt"}, "l.txt", capsys, tmp_path)


def test_errors_of_loader_processes_are_one_line(tmp_path, capsys):
    folder = write_folder(tmp_path / "p", a__png=encoded(), b__png=encoded()[:50])
    section = {"target": "ldm.data.formats.folder.ImageFolder", "params": {"path": str(folder), "image_size": SIDE}}
    loader = DataModuleFromConfig(1, test=section, num_workers=2).test_dataloader()
    assert run_command(lambda: len(list(loader))) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"error: {folder / 'b.png'}: expected a complete") and "\n" not in said


def test_the_check_does_not_end_at_damaged_files(tmp_path, capsys):
    files = {f"{k:03d}__png": encoded() if k % 2 else encoded()[:50] for k in range(60)}
    folder = write_folder(tmp_path / "p", **files)
    status, said = check("folder", {"path": folder, "image_size": SIDE}, capsys, tmp_path)
    assert status == 1 and "60 images, 30 problems" in said and "PROBLEM: ... 30 images in all" in said
    assert said.count("PROBLEM") == 21 and "038.png" in said and "058.png" not in said
