"""Tests that launch kernels put their tensors where kernels run, or are refused before any test begins."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from smt_kernels import use_backend, window_attention


def marked(each: SimpleNamespace) -> None:
    pass


def named(each: SimpleNamespace) -> None:
    window_attention(each, each, each, n_memory=1, backend="triton")


def chosen(each: SimpleNamespace) -> None:
    with use_backend("triton"):
        pass


@pytest.fixture
def conftest(request):
    path = str(Path(__file__).with_name("conftest.py"))
    (module,) = [plugin for plugin in request.config.pluginmanager.get_plugins() if getattr(plugin, "__file__", "") == path]
    return module


def item(function, *fixtures: str, **markers: dict) -> SimpleNamespace:
    """What collection knows of a test."""
    marks = {name: SimpleNamespace(kwargs=options) for name, options in markers.items()}
    return SimpleNamespace(nodeid=function.__name__, function=function, fixturenames=fixtures, get_closest_marker=marks.get)


def test_whoever_asks_for_triton_takes_the_device(conftest, pytestconfig):
    astray = [item(marked, triton={}), item(named), item(chosen, "monkeypatch")]
    apart = [
        item(marked, "device", triton={}),
        item(named, "device"),
        item(marked, triton={"launches": False}),
        item(marked, triton={}, interpreter={}),
        item(marked),
    ]
    with pytest.raises(pytest.UsageError, match=r"marked\nnamed\nchosen$"):
        conftest.pytest_collection_modifyitems(pytestconfig, astray + apart)
    assert not any(conftest._launches_kernels(each) and "device" not in each.fixturenames for each in apart)


def test_what_is_begun_first_is_there(conftest):
    for name in conftest.LONGEST:
        assert list(Path(__file__).parent.rglob(name)), name
