"""A caller that goes away while its code runs: the code is stopped, and the session goes on with what it had."""

import httpx
import pytest

LANGUAGES = {
    "python": ("kept = 'kept'", "import time; time.sleep(1000)", "print(kept)"),
    "javascript": ("var kept = 'kept'", "await new Promise((go) => setTimeout(go, 1e6))", "console.log(kept)"),
    "bash": ("echo kept > kept", "sleep 1234", "cat kept; pgrep -fx 'sleep 1234' || true"),
}
GIVES_UP_S = 1.5


@pytest.mark.parametrize("language", LANGUAGES)
def test_its_code_is_stopped_and_the_next_call_runs_at_once(module_servers, language):
    before, endless, after = LANGUAGES[language]
    with module_servers.client() as vm:
        assert vm.execute(before, language=language).exit_code == 0
        url, headers = f"http://127.0.0.1:{module_servers.port}", {"X-API-Key": module_servers.key}
        ask = {"command": endless, "language": language, "session_id": vm.session_id, "timeout": 600}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/execute", json=ask, headers=headers, timeout=GIVES_UP_S)
        shown = vm.execute(after, language=language, timeout=60)
        assert (shown.stdout, shown.exit_code) == ("kept\n", 0)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_streamed_execution_is_stopped_by_cancel_alone(module_servers, language):
    before, endless, after = LANGUAGES[language]
    with module_servers.client() as vm:
        vm.execute(before, language=language)
        following = vm.stream(f"echo on; {endless}" if language == "bash" else _says_on(language, endless), language)
        first = next(event for event in following if event.type == "stdout")
        assert vm.cancel(first.execution_id)
        (*_, last) = following
        assert (last.result.reason, last.result.exit_code, last.result.stdout) == ("cancelled", 130, "on\n")
        assert vm.execute(after, language=language, timeout=60).stdout == "kept\n"


def _says_on(language, code):
    return f"print('on', flush=True)\n{code}" if language == "python" else f"console.log('on')\n{code}"
