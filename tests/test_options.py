"""The command line and YAML mean what they say, and the same: every option of every dataclass."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from option_cases import (
    CLASSES,
    EACH_OPTION,
    FILES,
    ODD_TEXTS,
    REQUIRED,
    TEXTS,
    WRONG_FILES,
    alone,
    flag,
    impossible_texts,
    possible_texts,
    quoted,
    values_of,
)

from kiem.cli import parse, run
from kiem.commands import COMMANDS
from kiem.config import (
    EvaluationOptions,
    InferenceOptions,
    PreprocessOptions,
    ReportOptions,
    TrainingOptions,
)
from kiem.core.errors import ExitCode, UserError
from kiem.core.values import OptionType, option_types
from kiem.core.yaml_options import to_yaml

_OVERWRITES = HealthCheck.function_scoped_fixture  # one file, written anew for every example


def on_command_line(options: type[Any], name: str, text: str) -> Any:
    return getattr(parse(options, [f"{flag(name)}={text}"], "x"), name)


def in_file(options: type[Any], name: str, written: str | bytes, folder: Path) -> Any:
    """Returns an option's value from a file whose second line sets it."""
    file = folder / "config.yaml"
    data = written.encode() if isinstance(written, str) else written
    file.write_bytes(f"# options\n{name}: ".encode() + data + b"\n")
    return getattr(parse(options, ["--config", str(file)], "x"), name)


@pytest.mark.parametrize(("options", "name", "kind"), EACH_OPTION)
def test_impossible_values_are_refused_both_ways(
    options: type[Any],
    name: str,
    kind: OptionType,
    tmp_path: Path,
) -> None:
    for text in impossible_texts(kind):
        asked = "Write it in UTF-8" if text == "\ud800" else kind.describe()
        if kind.base is not bool and not (kind.choices and text == "\ud800"):
            with pytest.raises(UserError) as refused:
                on_command_line(options, name, text)
            message = str(refused.value)
            assert message.startswith(f"{flag(name)}: ")
            assert asked in message
            assert refused.value.exit_code == ExitCode.BAD_OPTION
            assert text[:9].strip() in message or not text.isprintable()
        written = quoted(text) if text != "\ud800" else '"\\ud800"'
        with pytest.raises(UserError, match=r"config\.yaml:2: ") as refused_in_file:
            in_file(options, name, written, tmp_path)
        assert f":2: {name}: " in str(refused_in_file.value)
        assert asked in str(refused_in_file.value)
        assert refused_in_file.value.exit_code == ExitCode.BAD_OPTION


@pytest.mark.parametrize(("options", "name", "kind"), EACH_OPTION)
def test_possible_values_are_the_same_both_ways(
    options: type[Any], name: str, kind: OptionType, tmp_path: Path
) -> None:
    for text in possible_texts(kind):
        found = in_file(options, name, quoted(text), tmp_path)
        value = found[0] if kind.is_list else found
        assert type(value) is kind.base or (kind.base is Path and isinstance(value, Path))
        if kind.base is bool:
            written = flag(name) if value else f"--no-{name.replace('_', '-')}"
            assert parse(options, [written], "x") == options(**{name: value})
        else:
            assert on_command_line(options, name, text) == found
        if kind.base is str:
            assert value == text


@pytest.mark.parametrize(("options", "name", "kind"), EACH_OPTION)
def test_files_set_what_has_the_right_shape(
    options: type[Any], name: str, kind: OptionType, tmp_path: Path
) -> None:
    good = quoted(possible_texts(kind)[0])
    (field,) = dataclasses.fields(options)
    for null in ("", "~", "null", "NULL"):
        if field.default is not dataclasses.MISSING:
            assert in_file(options, name, null, tmp_path) == field.default
    wrong = ["{a: b}", f"[[{good}]]", f"[{good}, {{a: b}}]", "[null]", "[~, ~]"]
    for written in wrong if kind.is_list else [*wrong, f"[{good}]", "[]"]:
        with pytest.raises(UserError, match=rf"config\.yaml:2: {name}: "):
            in_file(options, name, written, tmp_path)


@pytest.mark.parametrize(("options", "name", "kind"), EACH_OPTION)
def test_every_number_has_limits_and_its_default_is_within(
    options: type[Any], name: str, kind: OptionType
) -> None:
    assert (kind.limits is not None) == (kind.base in (int, float))
    if kind.limits is not None:
        assert (kind.limits.ge is None) != (kind.limits.gt is None)
        assert (kind.limits.le is None) != (kind.limits.lt is None)
        default = getattr(parse(options, [], "x"), name)
        is_unset = default in (None, ())
        assert is_unset or on_command_line(options, name, repr(default)) == default


LISTS = [
    pytest.param(name, option, kind, id=f"{name}-{option}")
    for name, command in COMMANDS.items()
    for option, kind in option_types(command.options).items()
    if kind.is_list
]


@pytest.mark.parametrize(("command", "name", "kind"), LISTS)
def test_a_repeated_option_adds_to_the_list(
    command: str, name: str, kind: OptionType, tmp_path: Path
) -> None:
    numbers = {float: ("1", "2.5", "3"), int: ("1", "2", "3")}
    words = numbers.get(kind.base, ("a", "b", "--serve"))
    a, b, c, *_ = kind.choices or words
    options, option = alone(COMMANDS[command].options, name), flag(name)

    def value(*words: str) -> Any:
        return getattr(parse(options, words, "x"), name)

    ab, abc = (tuple(map(kind.base, items)) for items in ((a, b), (a, b, c)))
    assert value(option, a, b) == ab
    assert value(option, a, option, b) == ab
    assert value(f"{option}={a}", f"{option}={b}") == ab
    assert value(option, a, b, f"{option}={c}") == abc
    assert value(f"{option}={a}", b, option, f"{option}={c}") == abc
    assert value(option, a, b, option, a) == (*ab, ab[0])
    assert value(option.replace("-", "_").replace("__", "--"), a, option, b) == ab
    # The command line replaces what the file says; what the file says replaces the default.
    file = tmp_path / "config.yaml"
    file.write_text(f"{name}: [{quoted(c)}, {quoted(a)}]")
    assert value("--config", str(file)) == (abc[2], abc[0])
    assert value("--config", str(file), option, a, option, b) == ab
    if kind.min_length:
        with pytest.raises(UserError, match=f"{option}: no value is given"):
            value("--config", str(file), option)
    else:
        assert value("--config", str(file), option) == ()
    file.write_text(f"{name}: {quoted(c)}")
    assert value("--config", str(file)) == (abc[2],)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (InferenceOptions, ["--model-path", "x", "--stop"]),
        (PreprocessOptions, ["--decontaminate"]),
        (PreprocessOptions, ["--source"]),
        (EvaluationOptions, ["--model-path", "x", "--data"]),
        (ReportOptions, ["--runs"]),
        (ReportOptions, []),
    ],
)
def test_a_list_without_values_is_refused_where_it_says_nothing(
    options: type[Any], words: list[str]
) -> None:
    with pytest.raises(UserError, match="no value is given"):
        parse(options, words, "x")


def test_the_last_of_a_repeated_other_option_counts() -> None:
    words = ["--model-path", "x", "--seed", "1", "--serve", "--seed=2", "--no-serve"]
    options = parse(InferenceOptions, words, "x")
    assert (options.seed, options.serve) == (2, False)
    assert (
        parse(TrainingOptions, ["--dataset-path", "x", "--sample-prompt"], "x").sample_prompt == ()
    )


@pytest.mark.parametrize(("options", "text", "expected"), FILES)
def test_files_say_what_stands_there(
    options: type[Any], text: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(text.encode())
    default = parse(options, REQUIRED[options], "x")
    found = parse(options, [*REQUIRED[options], "--config", str(file)], "x")
    assert found == dataclasses.replace(default, **expected)


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_files_get_one_message(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, message = WRONG_FILES[case]
    file = tmp_path / "[b]config.yaml"
    file.write_bytes(data)
    words = ["--dataset-path", "x", "--config", str(file)]
    assert run(TrainingOptions, "x", pytest.fail, words) == ExitCode.BAD_OPTION
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {file}")
    assert message in shown.removeprefix(f"error: {file}")
    assert len(shown.splitlines()) == 2, shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config"], "--config: no value is given"),
        (["--config="], "--config: '' is not possible"),
        (["--config", ""], "--config: '' is not possible"),
        (["--config", "--seed", "1"], "--config: no value is given"),
        (["--config", "a", "b"], "--config: 2 values are given"),
        (["--config", "nergens.yaml"], "nergens.yaml: cannot be read (No such file or directory)"),
        (["--config", "/"], "/: cannot be read (Is a directory)"),
        (["--config", "x" * 5000], "cannot be read (File name too long)"),
    ],
)
def test_config_names_one_file(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        parse(TrainingOptions, ["--dataset-path", "x", *words], "x")
    assert message in str(refused.value)
    assert refused.value.exit_code == ExitCode.BAD_OPTION


@pytest.mark.parametrize("options", CLASSES)
@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[_OVERWRITES])
def test_what_a_run_writes_reads_back(
    options: type[Any], data: st.DataObject, tmp_path: Path
) -> None:
    fields = {field.name: field.default for field in dataclasses.fields(options)}
    kinds = option_types(options)
    written = options(
        **{name: data.draw(values_of(kinds[name], fields[name]), name) for name in fields}
    )
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(written), encoding="utf-8", newline="")
    assert parse(options, ["--config", str(file)], "x") == written


@given(
    option=st.sampled_from([option.values for option in EACH_OPTION]),
    text=st.from_regex(r"[-+]?[0-9_.]{0,9}(e-?[0-9])?", fullmatch=True) | ODD_TEXTS | TEXTS,
)
@settings(max_examples=200, deadline=None, suppress_health_check=[_OVERWRITES])
def test_any_text_means_the_same_both_ways(
    option: tuple[Any, str, OptionType], text: str, tmp_path: Path
) -> None:
    options, name, kind = option
    found: list[Any] = []
    for read in (on_command_line, partial(in_file, folder=tmp_path)):
        try:
            found.append(read(options, name, text if read is on_command_line else quoted(text)))
        except (UserError, SystemExit):
            found.append("refused")
    assert kind.base is bool or found[0] == found[1]


@pytest.mark.parametrize("words", [["--plan", "False"], ["--plan=true"], ["--no_plan=0"]])
def test_flags_take_no_value(words: list[str]) -> None:
    with pytest.raises(UserError, match="takes no value") as refused:
        parse(TrainingOptions, ["--dataset-path", "d", *words], "x")
    assert str(refused.value).startswith(words[0].partition("=")[0].replace("no_", "no-") + ": ")
    assert "Write --plan or --no-plan." in str(refused.value)


def test_words_of_a_list_are_no_flags() -> None:
    words = ["--dataset-path", "d", "--sample-prompt", "plan", "true", "no-plan"]
    assert parse(TrainingOptions, words, "x").sample_prompt == ("plan", "true", "no-plan")
