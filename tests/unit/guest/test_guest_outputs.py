"""Rich outputs: what a value can show beside its text."""

import base64

import pytest

TABLE = "class Table:\n    def __repr__(self): return 'table'\n    def _repr_html_(self): return '<table/>'\n"


def test_a_last_expression_with_html_is_text_and_an_output(worker):
    answer = worker.run(TABLE + "Table()")
    assert answer.stdout == "table\n"
    assert answer.outputs == [{"text/html": "<table/>", "text/plain": "table"}]


def test_display_shows_each_of_its_values_in_order(worker):
    answer = worker.run(TABLE + "display(Table(), 'text', Table())")
    assert answer.stdout == "table\ntext\ntable\n"
    assert len(answer.outputs) == 2


@pytest.mark.parametrize("value", ["[1, 2]", "'text'", "{1: 2}", "object()", "int", "None", "Table"])
def test_values_with_nothing_but_text_are_no_outputs(worker, value):
    assert worker.run(TABLE + value).outputs == []


def test_pixels_are_base64_and_json_is_json(worker):
    code = (
        "class Both:\n"
        "    def _repr_png_(self): return b'\\x89PNG'\n"
        "    def _repr_json_(self): return {'a': [1]}\n"
        "Both()"
    )
    (output,) = worker.run(code).outputs
    assert base64.b64decode(output["image/png"]) == b"\x89PNG"
    assert output["application/json"] == {"a": [1]}


def test_a_bundle_may_come_with_metadata_which_is_left_out(worker):
    code = "class A:\n    def _repr_mimebundle_(self, **k): return {'text/markdown': '# hi'}, {'meta': 1}\nA()"
    (output,) = worker.run(code).outputs
    assert output["text/markdown"] == "# hi"


def test_a_form_that_fails_is_told_and_the_others_are_shown(worker):
    code = TABLE + "class Bad(Table):\n    def _repr_markdown_(self): raise ValueError('no markdown')\nBad()"
    answer = worker.run(code)
    assert "no markdown" in answer.stderr
    assert answer.outputs[0]["text/html"] == "<table/>"
    assert answer.exit_code == 0


def test_too_many_outputs_are_cut_with_a_note(worker):
    answer = worker.run(TABLE + "for i in range(100): display(Table())")
    assert len(answer.outputs) == 64
    assert answer.cut
    assert answer.stderr.count("left out") == 1
    assert not worker.run("1").cut


def test_outputs_that_are_too_long_are_left_out(worker):
    answer = worker.run("class Big:\n    def _repr_html_(self): return 'x' * (9 << 20)\nBig()")
    assert (answer.outputs, answer.cut) == ([], True)


def test_figures_are_shown_without_a_call_and_closed(worker):
    """A stand-in with pyplot's face: that the real one is shown is tested in a sandbox."""
    code = (
        "import sys, types\n"
        "class Figure:\n"
        "    def savefig(self, file, **how): file.write(b'png')\n"
        "opened = {1: Figure(), 2: Figure()}\n"
        "plt = sys.modules['matplotlib.pyplot'] = types.SimpleNamespace(\n"
        "    get_fignums=lambda: list(opened), figure=opened.get, close=lambda what: opened.clear())\n"
        "sys.modules['matplotlib.figure'] = types.SimpleNamespace(Figure=Figure)"
    )
    answer = worker.run(code)
    assert [base64.b64decode(output["image/png"]) for output in answer.outputs] == [b"png", b"png"]
    assert worker.run("len(opened)").stdout == "0\n"


def test_a_value_that_displays_itself_does_so_and_nothing_else(worker):
    code = "class Own:\n    def _ipython_display_(self): print('by itself')\n"
    assert worker.run(code + "Own()").stdout == "by itself\n"
    assert worker.run("display(Own())").stdout == "by itself\n"


def test_a_form_that_fails_shows_no_frames_of_ours(worker):
    answer = worker.run("class Bad:\n    def _repr_html_(self): raise ValueError('no')\nBad()")
    assert "instavm" not in answer.stderr
    assert answer.stderr.count("File ") == 1


@pytest.mark.parametrize("bundle", ["['text/html']", "{5: 'x'}", "{'html': 'x'}", "{'image/png': 'no base64!'}"])
def test_a_bundle_that_is_none_is_told_and_the_text_is_there(worker, bundle):
    code = "class A:\n    def __repr__(self): return 'A'\n"
    answer = worker.run(code + f"    def _repr_mimebundle_(self, **k): return {bundle}\nA()")
    assert (answer.exit_code, answer.stdout, answer.outputs) == (0, "A\n", [])
    assert "left out" in answer.stderr


def test_warnings_of_a_form_name_no_file_of_ours(worker):
    code = "import warnings\nclass W:\n    def _repr_html_(self): warnings.warn('odd', stacklevel=2); return 'x'\nW()"
    assert worker.run(code).stderr == "UserWarning: odd\n"
