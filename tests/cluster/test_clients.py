"""Many clients of one session: nothing is lost, nothing is mixed up, cells take their turns."""

import threading

import pytest

from instavm import InstaVM

CLIENTS, ROUNDS = 8, 6


@pytest.mark.parametrize("live", [False, True])
def test_eight_clients_of_one_session_each_get_their_own_answers(module_servers, live):
    """Python cells run one at a time and share their variables, shell commands run beside them."""
    with module_servers.client() as owner:
        owner.execute("turns, inside = [], 0")
        failures = []

        def ask(vm: InstaVM, code, language):
            if not live:
                return vm.execute(code, language=language)
            *_, last = vm.stream(code, language=language)
            return last.result

        def work(client: int) -> None:
            try:
                with_session = module_servers.client(auto_start_session=False)
                with_session.session_id = owner.session_id
                for turn in range(ROUNDS):
                    cell = (
                        "import time; inside += 1; assert inside == 1; time.sleep(0.01)\n"
                        f"turns.append(({client}, {turn})); inside -= 1\nprint('cell', {client}, {turn})"
                    )
                    shown = ask(with_session, cell, "python")
                    assert (shown.exit_code, shown.stdout) == (0, f"cell {client} {turn}\n"), shown
                    shown = ask(
                        with_session, f"echo shell {client} {turn} >&2; seq 2000 | tail -1; exit {turn}", "bash"
                    )
                    assert (shown.exit_code, shown.stdout) == (turn, "2000\n"), shown
                    assert shown.stderr == f"shell {client} {turn}\n"
                with_session.close()
            except BaseException as exc:
                failures.append(exc)

        threads = [threading.Thread(target=work, args=(client,)) for client in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        told = eval(owner.execute("turns").stdout)
    assert sorted(told) == [(client, turn) for client in range(CLIENTS) for turn in range(ROUNDS)]
    for client in range(CLIENTS):
        assert [turn for one, turn in told if one == client] == list(range(ROUNDS)), "each client's in its order"
