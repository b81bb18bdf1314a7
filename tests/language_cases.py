"""Texts in several languages, and config files of FineWeb-2."""

from __future__ import annotations

from kiem.data.clean.languages import Language, find_language

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
