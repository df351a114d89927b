"""Rich outputs from a real sandbox: matplotlib and pandas as they are in the default image."""

import base64

import pytest

pytestmark = pytest.mark.anyio


def mimes(result):
    return [sorted(bundle) for bundle in result.outputs]


async def test_figures_and_tables_come_without_being_asked_for(sandbox):
    plain = await sandbox.python("import matplotlib.pyplot as plt\nplt.plot([1, 2, 3]);", timeout_s=120)
    assert (plain.exit_code, plain.stdout, mimes(plain)) == (0, "", [["image/png", "text/plain"]])
    assert base64.b64decode(plain.outputs[0]["image/png"]).startswith(b"\x89PNG")
    twice = await sandbox.python("plt.plot([1]); plt.show()\nplt.plot([2]); plt.show()", timeout_s=120)
    assert mimes(twice) == [["image/png", "text/plain"]] * 2
    assert (await sandbox.python("plt.get_fignums()")).stdout == "[]\n"
    table = await sandbox.python("import pandas\npandas.DataFrame({'a': [1, 2]})", timeout_s=120)
    assert table.stdout == "   a\n0  1\n1  2\n"
    assert "<td>2</td>" in table.outputs[0]["text/html"]
    assert mimes(await sandbox.python("display(pandas.DataFrame({'a': [1]}))")) == [["text/html", "text/plain"]]


async def test_what_ipython_displays_is_an_output(sandbox):
    code = "from IPython.display import HTML, Markdown, SVG, JSON, display\n"
    code += "display(HTML('<b>1</b>'))\ndisplay(Markdown('# 2'))\nSVG('<svg xmlns=\"http://www.w3.org/2000/svg\"/>')"
    result = await sandbox.python(code, timeout_s=60)
    assert result.stderr == ""
    assert [bundle.get("text/html") for bundle in result.outputs[:1]] == ["<b>1</b>"]
    assert result.outputs[1]["text/markdown"] == "# 2"
    assert "<svg" in result.outputs[2]["image/svg+xml"]
    assert result.stdout.count("object>") == 3


async def test_outputs_are_bounded_and_the_result_says_so(sandbox):
    code = "class Big:\n    def _repr_html_(self): return 'x' * (3 << 20)\nfor i in range(4): display(Big())"
    result = await sandbox.python(code)
    assert (len(result.outputs), result.truncated) == (2, True)
    assert "left out" in result.stderr
