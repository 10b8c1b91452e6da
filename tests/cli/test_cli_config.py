"""Configurations: units, defaults, and a message for everything that can be wrong in one."""

import re
from pathlib import Path

import pytest

from coba_triton.cli.config import Config, FileInput, UserError, builtins, load

BASE = """
[simulation]
dt = "0.1 ms"
duration = "20 ms"
[neuron]
count = 4
tau_syn_exc = "5 ms"
tau_syn_inh = "10 ms"
c_m = "200 pF"
g_l = "10 nS"
e_rev_E = "0 mV"
e_rev_I = "-80 mV"
v_rest = "-65 mV"
v_reset = "-65 mV"
v_thresh = "-50 mV"
[input]
kind = "poisson"
seed = 1
excitatory = { rate = "1 kHz", weight = "2 nS" }
"""


POPULATION = "[[population]]\nname = 'a'\nneurons = [{}, {}]\nv_thresh = '-48 mV'\n[input]"


def write(folder: Path, text: str) -> str:
    path = folder / "c.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def read(folder: Path, text: str) -> Config:
    return load(write(folder, text))[1]


@pytest.mark.parametrize(
    ("line", "table", "key", "value"),
    [
        ('dt = "100 us"', "simulation", "dt", 0.1),
        ('dt = "1e-4 s"', "simulation", "dt", 0.1),
        ('duration = "0.02 s"', "simulation", "duration", 20.0),
        ('c_m = "200 pF"', "neuron", "c_m", 0.2),
        ('c_m = "0.2 nF"', "neuron", "c_m", 0.2),
        ('c_m = "2e-10 farad"', "neuron", "c_m", 0.2),
        ('c_m = "2e-10 A²·s⁴/kg/m²"', "neuron", "c_m", 0.2),
        ('v_thresh = "-0.05 kg m**2 s^-3 A^-1"', "neuron", "v_thresh", -50.0),
        ('g_l = "10 nS"', "neuron", "g_l", 0.01),
        ('g_l = "0.01 µS"', "neuron", "g_l", 0.01),
        ('g_l = "1 / Mohm"', "neuron", "g_l", None),
        ('v_thresh = "-0.05 V"', "neuron", "v_thresh", -50.0),
        ('v_thresh = "-50mV"', "neuron", "v_thresh", -50.0),
    ],
)
def test_units_are_converted_to_the_models(tmp_path: Path, line: str, table: str, key: str, value: float | None) -> None:
    text = re.sub(rf"^{key} = .*$", line, BASE, flags=re.MULTILINE)
    if value is None:  # a number and a unit are needed, not an expression
        with pytest.raises(UserError, match="unknown unit '/ Mohm'"):
            read(tmp_path, text)
    else:
        assert getattr(getattr(read(tmp_path, text), table), key) == value


MINUS, EN_DASH, NO_BREAK = "\u2212", "\u2013", "\u00a0"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le with a mark"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_encodings(tmp_path: Path, encoding: str, newline: str) -> None:
    text = BASE.replace("\n", newline).replace("10 nS", "0.01 µS")
    mark = b"\xff\xfe" if "mark" in encoding else b""
    (tmp_path / "c.toml").write_bytes(mark + text.encode(encoding.split()[0]))
    assert load(str(tmp_path / "c.toml"))[1] == read(tmp_path, BASE)


@pytest.mark.parametrize("sign", [MINUS, EN_DASH, "\u2010", "\u2011", "\uff0d", "\ufe63"])
def test_minus_signs_of_papers(tmp_path: Path, sign: str) -> None:
    text = BASE.replace('"-50 mV"', f'"{sign}5e{sign}2{NO_BREAK}V"').replace('"-80 mV"', f'"{sign}80\u202fmV"')
    neuron = read(tmp_path, text).neuron
    assert (neuron.v_thresh, neuron.e_rev_I) == (-50.0, -80.0)
    with pytest.raises(UserError, match=r"neuron.g_l: must not be negative, got"):
        read(tmp_path, BASE.replace('"10 nS"', f'"{sign}10 nS"'))


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("seed = 1", f"seed = {MINUS}1", f"'{MINUS}' is U+2212 MINUS SIGN: write '-'"),
        ('"5 ms"', "\u201c5 ms\u201d", "'\u201c' is U+201C LEFT DOUBLE QUOTATION MARK: write '\"'"),
        ('"5 ms"', "\u20185 ms\u2019", "'\u2018' is U+2018 LEFT SINGLE QUOTATION MARK: write \"'\""),
        ("count = 4", f"count{NO_BREAK}= 4", "'\\xa0' is U+00A0 NO-BREAK SPACE: write ' '"),
    ],
)
def test_look_alikes_are_named(tmp_path: Path, old: str, new: str, name: str) -> None:
    line = BASE.split(old)[0].count("\n") + 1
    with pytest.raises(UserError, match=re.escape(f"; in line {line}, {name}")):
        read(tmp_path, BASE.replace(old, new))


def test_rates_and_weights(tmp_path: Path) -> None:
    settings = read(tmp_path, BASE).input
    assert settings.kind == "poisson"
    assert (settings.excitatory.rate, settings.excitatory.weight) == (1000.0, 0.002)
    assert settings.inhibitory is None


def test_defaults(tmp_path: Path) -> None:
    config = read(tmp_path, BASE)
    assert (config.simulation.steps, config.simulation.backend, config.simulation.order) == (
        200,
        "auto",
        "decay_first",
    )
    assert (config.record.neurons, config.record.variables) == ([0], ["v"])


def test_resolved_configuration_reads_back_the_same(tmp_path: Path) -> None:
    config = read(tmp_path, BASE)
    resolved = config.model_dump(mode="json")
    assert resolved["neuron"]["c_m"] == "0.2 nF"
    assert Config.model_validate(resolved) == config


CURRENT = re.sub(r"e_rev_. = .*\n", "", BASE).replace("[input]", 'synapses = "current"\n[input]').replace("2 nS", "50 pA")
PROJECTION = """[[projection]]
receptor = "inhibitory"
probability = 0.5
seed = 3
weight = {{ law = "{}", mean = "{}", std = "10 pA" }}
"""


def test_weights_of_currents_are_currents_and_read_back_the_same(tmp_path: Path) -> None:
    config = read(tmp_path, CURRENT + PROJECTION.format("normal", "0.1 nA"))
    assert (config.neuron.synapses, config.neuron.e_rev_E) == ("current", None)
    assert config.input.excitatory.weight == 0.05
    assert (config.projection[0].weight.mean, config.projection[0].weight.std) == (0.1, 0.01)
    resolved = config.model_dump(mode="json")
    assert resolved["input"]["excitatory"]["weight"] == "0.05 nA"
    assert resolved["projection"][0]["weight"]["std"] == "0.01 nA"
    assert Config.model_validate(resolved) == config
    assert read(tmp_path, BASE).model_dump(mode="json")["input"]["excitatory"]["weight"] == "0.002 uS"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            CURRENT.replace("50 pA", "2 nS"),
            "input.excitatory.weight must be a current such as '0.1 nA', as neuron.synapses is 'current', got 0.002 uS; ",
        ),
        (
            BASE.replace("2 nS", "50 pA"),
            "input.excitatory.weight must be a conductance such as '2 nS', as neuron.synapses is 'conductance', got 0.05 nA",
        ),
        (CURRENT + PROJECTION.format("lognormal", "2 nS"), "projection.0.weight.mean must be a current such as '0.1 nA'"),
        (CURRENT.replace("v_rest", 'e_rev_I = "-80 mV"\nv_rest'), "e_rev_I is for conductances, and neuron.synapses is"),
        (
            CURRENT.replace("[input]", POPULATION.format(1, 3).replace("v_thresh", "e_rev_E")),
            "e_rev_E is for conductances, and neuron.synapses is 'current'; leave it out",
        ),
        (CURRENT.replace('"current"', '"conductance"'), 'e_rev_E is missing; add it, such as e_rev_E = "0 mV"'),
        (CURRENT.replace("50 pA", "50 mV"), "'mV' does not measure a conductance or a current; expected"),
        (CURRENT.replace("50 pA", "-50 pA"), "must not be negative, got '-50 pA'"),
        (CURRENT.replace('"current"', '"curent"'), "synapses"),
    ],
)
def test_kinds_of_synapses_that_do_not_fit(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        read(tmp_path, text)


def test_populations_and_starts_read_back_the_same(tmp_path: Path) -> None:
    more = 'i_offset = "100 pA"\nv_init = { low = "-65 mV", high = "-0.05 V", seed = 3 }\n'
    config = read(tmp_path, BASE.replace("[input]", more + POPULATION.format(1, 3)))
    assert (config.neuron.i_offset, config.population[0].v_thresh, config.population[0].g_l) == (0.1, -48.0, None)
    resolved = config.model_dump(mode="json")
    assert resolved["neuron"]["v_init"] == {"low": "-65.0 mV", "high": "-50.0 mV", "seed": 3}
    assert Config.model_validate(resolved) == config


def test_paths_are_relative_to_the_configuration(tmp_path: Path) -> None:
    text = BASE[: BASE.index("[input]")] + '[input]\nkind = "file"\npath = "x.npy"\nweight = "1 nS"\n'
    settings = read(tmp_path, text).input
    assert isinstance(settings, FileInput)
    assert settings.path == tmp_path / "x.npy"


@pytest.mark.parametrize("name", builtins())
def test_builtins_are_valid_and_described(name: str) -> None:
    stem, config = load(name)
    assert stem == name
    assert 10 < len(config.description) < 75


RECORDING = """[input]
kind = "recording"
threshold = 1.0
signal = { source = "file", path = "x.npy", sampling_rate = "100 Hz" }
fan_out = { seed = 1, probability = 0.5, weight = "1 nS", excitatory_fraction = 0.8 }
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('dt = "0.1 ms"', "dt = 0.1", "simulation.dt: expected a time such as '5 ms', a number with its"),
        ('dt = "0.1 ms"', 'dt = "0.1"', "a number with its unit in quotes, got '0.1'"),
        ('dt = "0.1 ms"', 'dt = "0.1 mV"', "'mV' does not measure a time; expected a time such as '5 ms'"),
        ('dt = "0.1 ms"', 'dt = "0.1 parsnips"', "unknown unit 'parsnips'; expected a time such as '5 ms'"),
        ('dt = "0.1 ms"', 'dt = "0.1 ms ms)"', "unknown unit 'ms ms)'"),
        # numbers that would be computed without end
        ('dt = "0.1 ms"', 'dt = "0.1 ms**9**9**9**9"', "unknown unit 'ms**9**9**9**9'"),
        ('dt = "0.1 ms"', 'dt = "0.1 ms*(9^9)^9^9"', "unknown unit 'ms*(9^9)^9^9'"),
        ('dt = "0.1 ms"', 'dt = "0.1 ms/9⁹⁹⁹⁹⁹⁹⁹⁹"', "unknown unit 'ms/9⁹⁹⁹⁹⁹⁹⁹⁹'"),
        ('dt = "0.1 ms"', f'dt = "0.1 {"m" * 10**5}s"', "expected a time such as '5 ms'"),
        ('dt = "0.1 ms"', 'dt = "1e999 ms"', "'1e999 ms' is too large"),
        ('dt = "0.1 ms"', 'dt = "-1 ms"', "simulation.dt: must be above 0, got '-1 ms'"),
        ('dt = "0.1 ms"', 'dt = "0.3 ms"', "whole number of steps of dt = 0.3 ms, got 20.0 ms; the nearest is 20.1"),
        ('"10 nS"', '"10 mV"', "neuron.g_l: 'mV' does not measure a conductance; expected a conductance"),
        ('"200 pF"', '"200 pA"', "'pA' does not measure a capacitance"),
        ("v_thresh =", "v_tresh =", "neuron: unknown key 'v_tresh'; did you mean 'v_thresh'?"),
        ("v_thresh =", "q =", "neuron: unknown key 'q'; the keys are count, tau_syn_exc"),
        ('v_thresh = "-50 mV"', "", "neuron: v_thresh is missing; add it, such as v_thresh = \"-65 mV\""),
        ("count = 4", "count = 4.5", "neuron.count: should be a valid integer, got 4.5"),
        ("count = 4", "count = 0", "neuron.count: should be greater than 0, got 0"),
        ("seed = 1", "seed = -1", "input.seed: should be greater than or equal to 0, got -1"),
        ('"poisson"', '"poison"', "input: kind must be one of 'poisson', 'events', 'file', 'recording', 'channels', 'none'"),
        ('kind = "poisson"', "", "input: kind is missing"),
        ("rate =", "rat =", "input.excitatory: unknown key 'rat'; did you mean 'rate'?"),
        ("excitatory =", "# excitatory =", "input: excitatory or inhibitory is missing; add one of them or both"),
        ("[input]", 'i_offset = "1 mV"\n[input]', "neuron.i_offset: 'mV' does not measure a current; expected a c"),
        ("[input]", 'v_init = "1 nA"\n[input]', "neuron.v_init: 'nA' does not measure a potential"),
        ("[input]", 'v_init = { low = "1 nA" }\n[input]', "neuron.v_init: high is missing"),
        ("[input]", 'v_init = { low = "1 mV", high = "0 mV", seed = 1 }\n[input]', "neuron.v_init: low must not be above"),
        ("[input]", POPULATION.format(0, 5), "population.neurons of 'a' must be a first neuron and the one after the last"),
        ("[input]", POPULATION.format(2, 2), "up to neuron.count = 4, got [2, 2]"),
        ("[input]", POPULATION.format(0, 3).replace("[input]", "") + POPULATION.format(2, 4).replace("'a'", "'b'"),
         "population.neurons must be apart, got [2, 4] of 'b', and 'a' ends at 3"),
        ("[input]", POPULATION.format(0, 1).replace("[input]", "") + POPULATION.format(2, 4), "'all others', got 'a', 'a'"),
        ("[input]", POPULATION.format(0, 1).replace("v_thresh", "v_tresh"), "population.0: unknown key 'v_tresh'; did"),
        ("[input]", POPULATION.format(0, 1).replace("v_thresh = '-48 mV'", "i_offset = '1 nA'\ng_l = '0 nS'"),
         "i_offset needs g_l above 0, got i_offset = 1.0 nA and no leak"),
        ("[input]", "[inputs]", "unknown key 'inputs'; did you mean 'input'?"),
        ("[input]", "[record]\nneurons = [0, 4]\n[input]", "record.neurons must be below neuron.count = 4, got"),
        ("[input]", '[record]\nvariables = ["w"]\n[input]', "variables.0: should be 'v', 'g_e' or 'g_i', got 'w'"),
        ("[input]", "[input", "is not valid TOML (Expected ']'"),
    ],
)  # fmt: skip
def test_message(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert BASE.count(old) == 1
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read(tmp_path, BASE.replace(old, new))
    assert "\n" not in str(caught.value)
    assert "c.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('source = "file"', 'source = "tape"', "input.signal: source must be one of 'ecg', 'file', got"),
        ("probability = 0.5", "probability = 1.5", "input.fan_out.probability: should be less than or equal"),
        ("probability = 0.5", "probability = nan", "input.fan_out.probability: should be a finite number"),
        ('"100 Hz"', '"100 Hz", unit = "parsnip"', "input.signal.unit: unknown unit 'parsnip'"),
        ('"100 Hz"', '"100 ms"', "input.signal.sampling_rate: 'ms' does not measure a rate"),
    ],
)  # fmt: skip
def test_message_for_a_recording(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = BASE[: BASE.index("[input]")] + RECORDING
    read(tmp_path, text)
    with pytest.raises(UserError, match=re.escape(message)):
        read(tmp_path, text.replace(old, new))


def test_several_problems_are_counted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape("got 0.1 (and 1 more)")):
        read(tmp_path, BASE.replace('dt = "0.1 ms"', "dt = 0.1").replace("count = 4", "count = 0"))


def test_unreadable_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no configuration 'egc'; did you mean 'ecg'"):
        load("egc")
    with pytest.raises(UserError, match=r"no configuration 'x.toml'; give a TOML file or one of the names ecg, poisson, va"):
        load("x.toml")
    with pytest.raises(UserError, match=r"cannot read the file .*: Is a directory; give a TOML file"):
        load(str(tmp_path))
    (tmp_path / "latin.toml").write_bytes(b"# \xff")
    with pytest.raises(UserError, match="is not valid TOML"):
        load(str(tmp_path / "latin.toml"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ecg").mkdir()  # results of an earlier run do not hide the built-in
    assert load("ecg")[0] == "ecg"
