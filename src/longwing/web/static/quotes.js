// Where an answer's words stand in the document: pure functions on texts, no page.
//
// Words are compared without case and punctuation, so that a quotation survives other dashes, quote
// marks and line breaks; none goes beyond the end of a sentence. What counts as a quotation: five words or more in a row that stand in the
// document, two or more between quote marks, or a number of four digits or more (a name with digits,
// too) that the document has only a few times. Places are in UTF-16 units, as the page's ranges are.

const WORD =
  /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}]|[\p{L}\p{N}\p{M}]+/gu;
const QUOTED = /["“„«‹]([^"“”„«»‹›]{2,}?)["”“»›]/gu;
const BREAK = /[.!?。！？]["'”’»)\]]*\s|[。！？]|\n\s*\n/u; // between two words: the end of a sentence
const LONG = 5; // words in a row that are no accident
const RARE = 3; // times that a number may stand in the document and still point to a place
const MANY = 2000; // places of one word that are looked at: "the" alone leads nowhere

/** The words of a text with their places: {words, starts, stops}. */
export function wordsOf(text) {
  const words = [];
  const starts = [];
  const stops = [];
  for (const found of text.matchAll(WORD)) {
    words.push(found[0].toLowerCase());
    starts.push(found.index);
    stops.push(found.index + found[0].length);
  }
  return { words, starts, stops };
}

/** A document made ready to be searched; once a document. */
export function indexed(text) {
  const { words, starts, stops } = wordsOf(text);
  const places = new Map();
  words.forEach((word, place) => {
    const known = places.get(word);
    if (known) known.push(place);
    else places.set(word, [place]);
  });
  const ends = starts.map((_, place) => BREAK.test(text.slice(stops[place], starts[place + 1])));
  return { text, words, starts, stops, ends, places };
}

/**
 * The parts of `answer` that stand in the document.
 *
 * Returns a list of {from, to, start, stop}: the part of the answer, and where it stands; in the
 * answer's order, not overlapping.
 */
export function quotesIn(answer, document) {
  const own = wordsOf(answer);
  const marked = [...answer.matchAll(QUOTED)].map((found) => [
    found.index,
    found.index + found[0].length,
  ]);
  const found = [];
  for (let at = 0; at < own.words.length;) {
    const { place, length } = longest(own.words, at, document);
    const within = marked.some(
      ([from, to]) => own.starts[at] > from && own.stops[at + length - 1] < to,
    );
    if (
      length >= LONG ||
      (within && length >= 2) ||
      (length && pointsOut(own.words[at], document))
    ) {
      found.push({
        from: own.starts[at],
        to: own.stops[at + length - 1],
        start: document.starts[place],
        stop: document.stops[place + length - 1],
      });
      at += length;
    } else {
      at += 1;
    }
  }
  return once(found);
}

/** The longest run of words from `at` on that stands in the document, and its first place. */
function longest(words, at, document) {
  let best = { place: 0, length: 0 };
  const places = document.places.get(words[at]) ?? [];
  const most = words.length - at;
  for (const place of places.slice(0, MANY)) {
    const goesOn = (length) =>
      length < most &&
      !document.ends[place + length - 1] &&
      words[at + length] === document.words[place + length];
    let length = 1;
    while (goesOn(length)) length += 1;
    if (length > best.length) best = { place, length };
  }
  return best;
}

function pointsOut(word, document) {
  const digits = word.replace(/\P{N}/gu, "").length;
  return digits >= 4 && document.places.get(word).length <= RARE;
}

/** Each place of the document once: an answer that repeats itself has not found more. */
function once(found) {
  const seen = new Set();
  return found.filter(({ start, stop }) => {
    const place = `${start}-${stop}`;
    return !seen.has(place) && seen.add(place);
  });
}
