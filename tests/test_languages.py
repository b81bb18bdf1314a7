"""Languages to clean: their names, where their thresholds are from, and how they are told apart."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ROOT
from rich.console import Console

from kiem.config import PreprocessOptions
from kiem.core.errors import ExitCode, UserError
from kiem.data.chunks import read_manifest
from kiem.data.clean import frequent_words
from kiem.data.clean.filters import reject_reasons
from kiem.data.clean.languages import Language, find_language, list_languages
from kiem.data.clean.tokens import Tokens
from kiem.data.prepare.preprocess import preprocess
from kiem.tokenizer.tokenizer import Tokenizer

QUIET = Console(quiet=True)

# configs/<label>.yml of huggingface/fineweb-2, commits 05e6729567a5 and d331bee82ee2 (por, nds).
FINEWEB = {
    "fry_Latn": r"""dup_line_frac: 0.248
dup_n_grams: [[5, 0.12], [6, 0.113], [7, 0.102], [8, 0.093], [9, 0.083], [10, 0.075]]
language_score: 0.723
line_punct_thr: 0.056
max_avg_word_length: 11
max_non_alpha_words_ratio: 0.811
min_avg_word_length: 2
new_line_ratio: 0.181
stopwords: [de, fan, yn, it, en, in, e, op, is, mei, dat]
top_n_grams: [[2, 0.243], [3, 0.213], [4, 0.176]]
""",
    "cym_Latn": r"""dup_line_frac: 0.269
dup_n_grams: [[5, 0.144], [6, 0.131], [7, 0.12], [8, 0.108], [9, 0.097], [10, 0.088]]
language_score: 0.745
line_punct_thr: 0.25
max_avg_word_length: 9
max_non_alpha_words_ratio: 0.828
min_avg_word_length: 3
new_line_ratio: 0.167
stopwords: [yn, y, a, ffilm, o, gan, '''r', ar, mae, yw, cyfarwyddwr, ei, i, oedd, wedi]
top_n_grams: [[2, 0.258], [3, 0.196], [4, 0.165]]
""",
    "por_Latn": r"""dup_line_frac: 0.287
dup_n_grams: [[5, 0.163], [6, 0.153], [7, 0.141], [8, 0.13], [9, 0.119], [10, 0.108]]
language_score: 0.799
line_punct_thr: 0.077
max_avg_word_length: 13
max_non_alpha_words_ratio: 0.814
min_avg_word_length: 3
new_line_ratio: 0.186
stopwords: [de, a, e, o, em, do, da, que, um, 'no', uma, com, para, na, "\xE9", foi]
top_n_grams: [[2, 0.371], [3, 0.191], [4, 0.163]]
""",
    "nds_Latn": r"""dup_line_frac: 0.568
dup_n_grams: [[5, 0.351], [6, 0.328], [7, 0.292], [8, 0.267], [9, 0.245], [10, 0.218]]
language_score: 0.3
line_punct_thr: 0.12
max_avg_word_length: 12
max_non_alpha_words_ratio: 0.59
min_avg_word_length: 3
new_line_ratio: 0.162
stopwords: [de, in, un, vun, dat, is, "\u2019n", en, von, to, den, an, hett, he]
top_n_grams: [[2, 0.611], [3, 0.542], [4, 0.472]]
""",
}

# The preamble of the Universal Declaration of Human Rights, where it begins.
DECLARATION = {
    "dutch": "Overwegende, dat erkenning van de inherente waardigheid en van de gelijke en "
    "onvervreemdbare rechten van alle leden van de mensengemeenschap grondslag is "
    "voor de vrijheid, gerechtigheid en vrede in de wereld; Overwegende, dat "
    "terzijdestelling van en minachting voor de rechten van de mens geleid hebben "
    "tot barbaarse handelingen, die het geweten van de mensheid geweld hebben "
    "aangedaan en dat de komst van een wereld, waarin de mensen vrijheid van "
    "meningsuiting en geloof zullen genieten, en vrij zullen zijn van vrees en "
    "gebrek, is verkondigd als het hoogste ideaal van iedere mens.",
    "frisian": "Yn betinken nommen dat it erkennen fan de ynherinte weardichheid en fan de "
    "gelikense en ûnferfrjemdbere rjochten fan alle leden fan de minskemienskip "
    "grûnslach is foar de frijheid, rjochtfeardigens en frede yn 'e wrâld; Yn "
    "betinken nommen dat it oan 'e kant skowen en lytsachtsjen fan 'e rjochten "
    "fan 'e minske laat hawwe ta barbaarske dieden, dy't it gewisse fan it "
    "minskdorn faksearre hawwe en dat de komst fan in wrâld dêr't minsken "
    "frijheid fan mieningsutering en leauwe barre mei, en hja frij wêze sille fan "
    "eangst en ferlet, ferkundige is as it heechste ideaal fan elk minske.",
    "german": "Da die Anerkennung der angeborenen Würde und der gleichen und "
    "unveräußerlichen Rechte aller Mitglieder der Gemeinschaft der Menschen die "
    "Grundlage von Freiheit, Gerechtigkeit und Frieden in der Welt bildet, da die "
    "Nichtanerkennung und Verachtung der Menschenrechte zu Akten der Barbarei "
    "geführt haben, die das Gewissen der Menschheit mit Empörung erfüllen, und da "
    "verkündet worden ist, dass einer Welt, in der die Menschen Rede‐ und "
    "Glaubensfreiheit und Freiheit von Furcht und Not genießen, das höchste "
    "Streben des Menschen gilt.",
    "afrikaans": "AANGESIEN erkenning vir die inherente waardigheid en die gelyke en "
    "onvervreembare reg van alle lede van die menslike ras die basis vir vryheid, "
    "geregtigheid en vrede in die wereld is; AANGESIEN minagting vir menseregte "
    "barbaarse dade wat die gewete van die mens aangetas het en die aanvang van "
    "’n wereld waarin mense vryheid van spraak, geloof, vrees en behoefte het, "
    "gesien word as die hoogste aspirasie van die gemiddelde mens.",
    "polish": "ZWAŻYWSZY, że uznanie przyrodzonej godności oraz równych i niezbywalnych "
    "praw wszystkich członków wspólnoty ludzkiej jest podstawą wolności, "
    "sprawiedliwości i pokoju świata, ZWAŻYWSZY, że nieposzanowanie i "
    "nieprzestrzeganie praw człowieka doprowadziło do aktów barbarzyństwa, które "
    "wstrząsnęły sumieniem ludzkości, i że ogłoszono uroczyście jako "
    "najwznioślejszy cel ludzkości dążenie do zbudowania takiego świata, w którym "
    "ludzie korzystać będą z wolności słowa i przekonań oraz z wolności od "
    "strachu i nędzy.",
    "turkish": "İnsanlık ailesinin bütün üyelerinde bulunan haysiyetin ve bunların eşit ve "
    "devir kabul etmez haklarının tanınması hususunun, hürriyetin, adaletin ve "
    "dünya barışının temeli olmasına, İnsan haklarının tanınmaması ve hor "
    "görülmesinin insanlık vicdanını isyana sevkeden vahşiliklere sebep olmuş "
    "bulunmasına, dehşetten ve yoksulluktan kurtulmuş insanların, içinde söz ve "
    "inanma hürriyetlerine sahip olacakları bir dünyanın kurulması en yüksek "
    "amaçları oralak ilan edilmiş bulunmasına, İnsanin zulüm ve baskıya karşı son "
    "çare olarak ayaklanmaya mecbur kalmaması için insan haklarının bir hukuk "
    "rejimi ile korunmasının esaslı bir zaruret olmasına.",
    "russian": "Принимая во внимание, что признание достоинства, присущего всем членам "
    "человеческой семьи, и равных и неотъемлемых прав их является основой "
    "свободы, справедливости и всеобщего мира; и принимая во внимание, что "
    "пренебрежение и презрение к правам человека привели к варварским актам, "
    "которые возмущают совесть человечества, и что создание такого мира, в "
    "котором люди будут иметь свободу слова и убеждений и будут свободны от "
    "страха и нужды, провозглашено как высокое стремление людей.",
    "hindi": "चूंकि मानव परिवार के सभी सदस्यों के जन्मजात गौरव और समान तथा अविच्छिन्न "
    "अधिकार की स्वीकृति ही विश्व-शान्ति, न्याय और स्वतन्त्रता की बुनियाद है, "
    "चूंकि मानव अधिकारों के प्रति उपेक्षा और घृणा के फलस्वरूप ही ऐसे बर्बर कार्य "
    "हुए जिनसे मनुष्य की आत्मा पर अत्याचार किया गया, चूंकि एक ऐसी विश्व-व्यवस्था "
    "की उस स्थापना को ( जिसमें लोगों को भाषण और धर्म की आज़ादी तथा भय और अभाव से "
    "मुक्ति मिलेगी ) सर्वसाधारण के लिए सर्वोच्च आकांक्षा घोषित किया गया है.",
}


def language(name: str) -> Language:
    found = find_language(name)
    assert found is not None
    return found


@pytest.mark.parametrize("label", FINEWEB)
def test_thresholds_are_those_of_fineweb(label: str, tmp_path: Path) -> None:
    file = tmp_path / f"{label}.yml"
    file.write_text(FINEWEB[label])
    given, known = language(str(file)), language(label)
    assert given.thresholds == known.thresholds
    assert (given.label, given.title) == (label, label)
    assert yaml.safe_load(FINEWEB[label])["stopwords"] == [*known.thresholds.stopwords]


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("dutch", ["nl", "nld", "dut", "nld_Latn", "Dutch", "flemish", " NL "]),
        (
            "frisian",
            ["fy", "fry", "fry_Latn", "fy-Latn", "FRISIAN", "West Frisian", "west-frisian"],
        ),
        ("norwegian", ["no", "nb", "nob", "bokmal"]),
        ("nynorsk", ["nn", "nno_Latn"]),
        ("serbian", ["sr", "srp", "sr_Cyrl"]),
        ("serbian latin", ["sr_Latn", "srp_Latn", "serbian-latin"]),
        ("swahili", ["sw", "swa", "swh", "swh_Latn"]),
    ],
)
def test_languages_have_several_names(name: str, ways: list[str]) -> None:
    assert language(name).name == name
    for way in ways:
        assert language(way) == language(name)


def test_every_language_is_found() -> None:
    languages = list_languages()
    assert len({each.name for each in languages}) == len(languages) >= 70
    for each in languages:
        assert find_language(each.name) == find_language(each.label) == each
        if each.name != "serbian latin":  # its codes alone are the other script's
            assert all(find_language(code) == each for code in each.codes)
    documented = " ".join((ROOT / "docs/cleaning.md").read_text().split())
    titles = sorted(each.title for each in languages)
    assert f"There are: {', '.join(titles)}." in documented
    official = "bg hr cs da nl et fi fr de el hu ga it lv lt mt pl pt ro sk sl es sv"
    assert {*official.split()} <= {code for each in languages for code in each.codes}
    assert find_language("none") is find_language("None") is None


@pytest.mark.parametrize(
    ("given", "meant"),
    [("frisain", "frisian"), ("ducth", "dutch"), ("low-germn", "low german"), ("klingon", None)],
)
def test_unknown_language(given: str, meant: str | None) -> None:
    with pytest.raises(UserError) as caught:
        find_language(given)
    error = caught.value
    assert (error.where, error.exit_code) == ("--clean", ExitCode.BAD_OPTION)
    assert given in error.what
    assert (f"Did you mean {meant}" in error.fix) == (meant is not None)
    assert "fry_Latn.yml" in error.fix


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        (None, None, "No such file"),
        (None, "a: [", "not YAML"),
        (None, "", "Expected object"),
        (None, "- a", "Expected object"),
        (None, "\x00", "not YAML"),
        ("dup_line_frac: 0.248\n", "", "dup_line_frac"),
        ("0.056", "much", "line_punct_thr"),
        ("0.056", ".nan", "line_punct_thr"),
        ("0.056", "1e9", "line_punct_thr"),
        ("0.723", "1.5", "language_score"),
        ("[5, 0.12]", "[0, 0.12]", "dup_n_grams"),
        ("[5, 0.12]", "[5]", "dup_n_grams"),
        ("[de, fan, yn, it, en, in, e, op, is, mei, dat]", "[de]", "stopwords"),
        ("new_line_ratio", "new_line", "new_line"),
    ],
)
def test_files_that_are_no_config(
    old: str | None, new: str | None, what: str, tmp_path: Path
) -> None:
    file = tmp_path / "fry_Latn.yml"
    text = FINEWEB["fry_Latn"].replace(old, new or "", 1) if old else new
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=what) as caught:
        find_language(str(file))
    assert caught.value.where == f"--clean {file}"
    assert caught.value.exit_code == (ExitCode.NOT_FOUND if text is None else ExitCode.BAD_INPUT)


def test_a_language_is_told_from_others() -> None:
    for name, text in DECLARATION.items():
        assert reject_reasons([text], language(name)) == [None]
    for name, other in permutations(DECLARATION, 2):
        known = language(name)
        assert reject_reasons([DECLARATION[other]], known) == [f"not {known.title}"]


def test_vowel_signs_are_in_words() -> None:
    text = "हिन्दी में है। বাংলা, தமிழ் می\u200cشود קָדוֹשׁ"
    tokens = Tokens([text]).vocabulary
    expected = "हिन्दी में है । বাংলা , தமிழ் می\u200cشود קָדוֹשׁ"
    assert tokens == expected.split()


def test_one_language_makes_one_directory(tmp_path: Path, trained: Tokenizer) -> None:
    (tmp_path / "tokenizer.json").write_bytes(trained.json_bytes)
    lines = [{"text": f"{n}. {text}"} for n in range(20) for text in DECLARATION.values()]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = tmp_path / "fry_Latn.yml"
    config.write_text(FINEWEB["fry_Latn"])

    def make(clean: str, name: str = "a") -> dict[str, Any]:
        options = PreprocessOptions(
            source=(str(tmp_path / "in.jsonl"),),
            tokenizer=str(tmp_path / "tokenizer.json"),
            chunk_size=16,
            output_dir=tmp_path / "out",
            name=name,
            clean=clean,
            num_proc=1,
        )
        return read_manifest(preprocess(options, QUIET))

    manifest = make("fy")
    assert manifest["options"]["clean"] == "frisian"
    assert manifest["rejected"] == {"not Frisian": 20 * (len(DECLARATION) - 1)}
    assert make("West Frisian") == make("fry_Latn") == manifest
    with pytest.raises(UserError, match="--clean was 'frisian'"):
        make(str(config))
    given = make(str(config), "b")
    assert given["options"]["clean"].startswith("fry_Latn.yml ")
    assert given["splits"] == manifest["splits"]
    config.write_text(FINEWEB["fry_Latn"].replace("0.723", "0.724"))
    with pytest.raises(UserError, match=r"--clean was 'fry_Latn\.yml "):
        make(str(config), "b")


def test_words_are_counted_in_parts_of_many_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = [frozenset(["de", "een"]), frozenset(["een", "und"]), frozenset(["nergens"])]
    texts = [" ".join(["De", "een", "und", "x"] * (n % 5)) for n in range(50)]
    expected = np.array([[2, 2, 0]]).T * np.array([n % 5 for n in range(50)])
    for most_cells in (1, 30, 10**6):
        monkeypatch.setattr(frequent_words, "MOST_CELLS", most_cells)
        assert frequent_words.count_words(Tokens(texts), lists).tolist() == expected.tolist()
