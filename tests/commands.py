"""What every command of this repository must do with bad arguments."""

import pytest


def assert_refused_before_any_work(main, arguments, out, message, capsys):
    """Exit status 2 and a message, and nothing written to `out`."""
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
