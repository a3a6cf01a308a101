/* All statistics of documents that the quality rules ask about, in one pass over their words and lines.

   A word is what white space separates. What a word is made of is looked at where it occurs first; after that its
   occurrences are counted by a look into a table. The slow form of the same is statistics_plain.py. */
#include "statistics.h"

enum { /* flags of a word */
    LETTERED = 1, PLAIN_WORD = 2, BULLET = 4, ELLIPSIS_END = 8, SENTENCE_END = 16, LONG = 32, CURLY = 64,
    JAVASCRIPT = 128, /* and the parts of phrases: */
    LOREM = 1 << 8, IPSUM = 1 << 9, TERMS = 1 << 10, OF = 1 << 11, USE_BEGIN = 1 << 12, OWNER = 1 << 13,
    POLICY = 1 << 14, USE_END = 1 << 15, USES_END = 1 << 16, COOKIES = 1 << 17, STOP_WORD = 1 << 18
};
enum { SHORT_LINE = 30, LONG_WORD = 1000, FEW_WORDS = 3 };

/* What is known of the line that is read. */
typedef struct {
    size_t words, begin, end; /* from the first word to behind the last one */
    int32_t sentences;
    int long_word, javascript, policy, lorem_ipsum, curly;
    uint32_t first, last;       /* flags of its first and its last word */
    uint32_t phrase1, phrase2;  /* flags of the last word and the one before, where one space joins them */
} Line;

/* What the characters of a word have led to so far. */
typedef struct {
    int dots;                /* in a row */
    int ended, ended_inside; /* a mark that ends sentences, and one beyond ASCII, with only closers behind it */
} Marks;

static uint8_t lower(uint8_t byte) { return byte >= 'A' && byte <= 'Z' ? byte + 32 : byte; }

static int same(const uint8_t *bytes, const char *pattern, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (lower(bytes[i]) != (uint8_t)pattern[i]) return 0;
    return 1;
}

static int begins(const uint8_t *word, size_t bytes, const char *pattern) {
    size_t count = strlen(pattern);
    return bytes >= count && same(word, pattern, count);
}

static int closes(const uint8_t *word, size_t bytes, const char *pattern) {
    size_t count = strlen(pattern);
    return bytes >= count && same(word + bytes - count, pattern, count);
}

#define TWO(a, b) ((a) << 8 | (b))

static uint32_t phrase_flags(const uint8_t *word, size_t bytes) {
    uint32_t flags = 0;
    if (bytes < 2) return 0;
    switch (TWO(lower(word[0]), lower(word[1]))) { /* what a word begins with */
    case TWO('i', 'p'): if (begins(word, bytes, "ipsum")) flags |= IPSUM; break;
    case TWO('o', 'f'): if (bytes == 2) flags |= OF; break;
    case TWO('u', 's'): if (begins(word, bytes, "use")) flags |= USE_BEGIN; break;
    case TWO('p', 'o'): if (begins(word, bytes, "policy")) flags |= POLICY; break;
    case TWO('c', 'o'): if (begins(word, bytes, "cookies")) flags |= COOKIES; break;
    default: break;
    }
    switch (TWO(lower(word[bytes - 2]), lower(word[bytes - 1]))) { /* what it ends with */
    case TWO('e', 'm'): if (closes(word, bytes, "lorem")) flags |= LOREM; break;
    case TWO('c', 'y'): if (closes(word, bytes, "privacy")) flags |= OWNER; break;
    case TWO('i', 'e'): if (closes(word, bytes, "cookie")) flags |= OWNER; break;
    case TWO('s', 'e'): if (closes(word, bytes, "use")) flags |= USE_END; break;
    case TWO('m', 's'): if (closes(word, bytes, "terms")) flags |= TERMS; break;
    case TWO('e', 's'): if (closes(word, bytes, "uses")) flags |= USES_END; break;
    default: break;
    }
    for (size_t i = 0; i + 10 <= bytes; i++)
        if ((word[i] | 32) == 'j' && same(word + i, "javascript", 10)) return flags | JAVASCRIPT;
    return flags;
}

static int is_stop_word(const uint8_t *word, size_t bytes) {
    static const char *const known[] = {"the", "be", "to", "of", "and", "that", "have", "with"};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strlen(known[i]) == bytes && !memcmp(known[i], word, bytes)) return 1;
    return 0;
}

static int ends_in_ellipsis(const uint8_t *word, size_t bytes) {
    return bytes >= 3 && (!memcmp(word + bytes - 3, "...", 3) || !memcmp(word + bytes - 3, "\xE2\x80\xA6", 3));
}

/* What a character is, besides being counted. */
static void see_mark(Word *word, uint32_t point, uint8_t bits, Marks *marks) {
    word->hashes += point == '#';
    marks->dots = point == '.' ? marks->dots + 1 : 0;
    if (marks->dots == 3 || point == 0x2026) {
        word->ellipses++;
        marks->dots = 0;
    }
    if (bits & TERMINAL) {
        marks->ended = 1;
        marks->ended_inside |= point >= 0x80;
    } else if (!(bits & CLOSER)) {
        word->ends += marks->ended_inside;
        marks->ended = marks->ended_inside = 0;
    }
    if (point == '{') word->flags |= CURLY;
}

/* Looks at the characters of a word of ASCII, eight at once; only those that are no letters and digits one by one. */
static int describe_ascii(const Work *work, const uint8_t *bytes, size_t count, Word *word, Marks *marks) {
    const uint64_t ones = 0x0101010101010101u, high = 0x8080808080808080u;
    size_t next = 0; /* behind the last character that was looked at */
    for (size_t at = 0; at < count; at += 8) {
        uint64_t used = count - at < 8 ? high >> (64 - 8 * (count - at)) : high, eight = eight_bytes(bytes + at);
        if (eight & used) return 0;
        eight &= ~high;
        uint64_t folded = eight | 0x20 * ones; /* below 128 no sum is carried over: bit 7 says "this or more" */
        uint64_t letters = (folded + (0x80 - 'a') * ones) & ~(folded + (0x80 - 'z' - 1) * ones) & used;
        uint64_t digits = (eight + (0x80 - '0') * ones) & ~(eight + (0x80 - '9' - 1) * ones) & used;
        word->letters += (int32_t)((letters >> 7) * ones >> 56);
        word->digits += (int32_t)((digits >> 7) * ones >> 56);
        for (uint64_t others = used & ~(letters | digits); others; others &= others - 1) {
            size_t place = at + (size_t)__builtin_ctzll(others) / 8;
            if (place > next) *marks = (Marks){0};
            next = place + 1;
            see_mark(word, bytes[place], work->classes[bytes[place]], marks);
        }
    }
    if (next < count) marks->ended = 0;
    word->chars = (int32_t)count;
    return 1;
}

/* Looks at the characters of a word that was not met before. */
static void describe(const Work *work, const uint8_t *bytes, Word *word) {
    size_t count = (size_t)word->bytes, at = 0;
    int plain = 0;
    Word blank = *word;
    Marks marks = {0};
    if (!describe_ascii(work, bytes, count, word, &marks)) {
        *word = blank;
        marks = (Marks){0};
        while (at < count) {
            uint32_t point = next_point(bytes, &at);
            uint8_t bits = work->classes[point];
            word->chars++;
            word->letters += (bits & LETTER) != 0;
            word->digits += point >= '0' && point <= '9';
            word->unspaced += (bits & UNSPACED) != 0;
            plain |= bits & PLAIN;
            see_mark(word, point, bits, &marks);
        }
    }
    word->flags |= phrase_flags(bytes, count) | (is_stop_word(bytes, count) ? STOP_WORD : 0);
    if (word->letters) word->flags |= LETTERED;
    if (plain || word->letters || word->digits) word->flags |= PLAIN_WORD;
    if (marks.ended) word->flags |= SENTENCE_END;
    if (word->chars > LONG_WORD) word->flags |= LONG;
    if (bytes[0] == '-' || (count >= 3 && !memcmp(bytes, "\xE2\x80\xA2", 3))) word->flags |= BULLET;
    if (ends_in_ellipsis(bytes, count)) word->flags |= ELLIPSIS_END;
}

static int set_slots(Work *work, size_t slots) {
    if (!reserve(&work->slots, &work->slots_room, slots, sizeof *work->slots)) return 0;
    memset(work->slots, 0, slots * sizeof *work->slots);
    work->mask = slots - 1;
    for (size_t i = 0; i < work->known; i++) {
        size_t slot = (size_t)work->words[i].hash & work->mask;
        while (work->slots[slot]) slot = (slot + 1) & work->mask;
        work->slots[slot] = (int32_t)i + 1;
    }
    return 1;
}

/* The place of a word among the known ones; -1 without memory. */
static int32_t known_word(Work *work, size_t start, size_t bytes) {
    const uint8_t *text = work->text;
    uint64_t hash = hash_bytes(text + start, bytes);
    size_t slot = (size_t)hash & work->mask;
    for (; work->slots[slot]; slot = (slot + 1) & work->mask) {
        const Word *word = work->words + work->slots[slot] - 1;
        if (word->hash == hash && (size_t)word->bytes == bytes &&
            (bytes <= 8 || !memcmp(text + word->start, text + start, bytes))) /* hashes of up to 8 bytes differ */
            return work->slots[slot] - 1;
    }
    size_t place = work->known;
    if (!reserve(&work->words, &work->words_room, place + 1, sizeof *work->words)) return -1;
    work->words[place] = (Word){.hash = hash, .start = (int64_t)start, .bytes = (int32_t)bytes, .document = -1};
    describe(work, text + start, work->words + place);
    work->slots[slot] = (int32_t)++work->known;
    return 2 * work->known <= work->mask || set_slots(work, 2 * (work->mask + 1)) ? (int32_t)place : -1;
}

static void see_phrases(Line *line, uint32_t flags, int joined) {
    uint32_t one = joined ? line->phrase1 : 0, two = joined ? line->phrase2 : 0;
    line->phrase2 = one;
    line->phrase1 = flags;
    if (!(flags & (IPSUM | POLICY | COOKIES | USE_BEGIN))) return;
    if (flags & IPSUM && one & LOREM) line->lorem_ipsum = 1;
    if (flags & POLICY && one & OWNER) line->policy = 1;
    if (flags & COOKIES && (one & (USE_END | USES_END) || (one & OF && two & USE_END))) line->policy = 1;
    if (flags & USE_BEGIN && one & OF && two & TERMS) line->policy = 1;
}

static int see_word(Work *work, size_t start, size_t end, Line *line, int32_t *row) {
    size_t place = (size_t)row[WORDS];
    if (!reserve(&work->id_of, &work->id_room, place + 1, sizeof *work->id_of) ||
        !reserve(&work->own, &work->own_room, place + 1, sizeof *work->own) ||
        !reserve(&work->before, &work->before_room, place + 2, sizeof *work->before))
        return 0;
    int32_t id = known_word(work, start, end - start);
    if (id < 0) return 0;
    Word *word = work->words + id;
    if (word->document != work->document) {
        word->document = work->document;
        word->count = 0;
        work->own[work->own_count++] = id;
    }
    word->count++;
    work->id_of[place] = id;
    work->before[place + 1] = work->before[place] + word->chars;
    row[WORDS]++;
    line->sentences += word->ends + ((line->last & SENTENCE_END) != 0); /* of the word before */
    if (!line->words++) {
        line->first = word->flags;
        line->begin = start;
    }
    see_phrases(line, word->flags, start && line->end + 1 == start && work->text[start - 1] == ' ');
    line->last = word->flags;
    line->end = end;
    line->long_word |= (word->flags & LONG) != 0;
    line->javascript |= (word->flags & JAVASCRIPT) != 0;
    line->curly |= (word->flags & CURLY) != 0;
    return 1;
}

/* Where a line ends without the citations ("[12]", "[edit]", "[citation needed]") at its end. */
static size_t without_citations(const uint8_t *text, size_t start, size_t end) {
    while (end > start && text[end - 1] == ']') {
        size_t open = end - 1;
        while (open > start && text[open - 1] >= '0' && text[open - 1] <= '9') open--;
        if (open > start && text[open - 1] == '[')
            end = open - 1;
        else if (end - start >= 6 && !memcmp(text + end - 6, "[edit]", 6))
            end -= 6;
        else if (end - start >= 17 && !memcmp(text + end - 17, "[citation needed]", 17))
            end -= 17;
        else
            break;
    }
    return end;
}

static int ended_as_c4(const uint8_t *text, size_t start, size_t end) {
    end = without_citations(text, start, end);
    return end > start && memchr(".?!\"'", text[end - 1], 5) &&
           !(end - start >= 3 && !memcmp(text + end - 3, "...", 3));
}

/* The column that counts this line: of the rule of C4 that drops it, or C4_LINES. */
static int c4_column(const Line *line, int ended) {
    if (line->long_word) return C4_LONG_WORD;
    if (!ended) return C4_UNENDED;
    if (line->words < FEW_WORDS) return C4_FEW_WORDS;
    if (line->lorem_ipsum) return C4_LOREM_IPSUM;
    if (line->javascript) return C4_JAVASCRIPT;
    if (line->curly) return C4_CURLY;
    return line->policy ? C4_POLICY : C4_LINES;
}

/* Counts a line under the rules of C4, and once more under all of them but that on its last mark. */
static void see_c4(const Line *line, int ended, int32_t chars, int32_t *row) {
    int column = c4_column(line, ended);
    row[column]++;
    if (column == C4_LINES) {
        row[C4_CHARS] += chars;
        row[C4_SENTENCES] += line->sentences + 1;
    }
    column = c4_column(line, 1);
    if (column >= C4_LOREM_IPSUM) row[column + C4_ANY_LOREM_IPSUM - C4_LOREM_IPSUM]++;
    if (column == C4_LINES) {
        row[C4_ANY_CHARS] += chars;
        row[C4_ANY_SENTENCES] += line->sentences + 1;
    }
}

static int ends_with_mark(const Work *work, const uint8_t *text, size_t start, size_t end) {
    size_t last = end - 1;
    while (last > start && (text[last] & 0xC0) == 0x80) last--;
    return (work->classes[next_point(text, &last)] & TERMINAL) != 0;
}

/* What a finished line from `start` to `end` adds; blank ones have no words. */
static void see_line(const Work *work, const uint8_t *text, size_t start, size_t end, const Line *line, int32_t *row) {
    int32_t chars = count_chars(text + start, end - start);
    row[CHARS] += chars;
    row[LINES]++;
    if (chars > row[LONGEST_LINE]) row[LONGEST_LINE] = chars;
    if (!line->words) {
        see_c4(line, 0, 0, row);
        return;
    }
    row[FILLED_LINES]++;
    row[BULLET_LINES] += (line->first & BULLET) != 0;
    row[ELLIPSIS_LINES] += (line->last & ELLIPSIS_END) != 0;
    row[ENDED_LINES] += ends_with_mark(work, text, start, end);
    row[SHORT_LINES] += chars <= SHORT_LINE;
    int32_t blanks = count_chars(text + start, line->begin - start) + count_chars(text + line->end, end - line->end);
    see_c4(line, ended_as_c4(text, line->begin, line->end), chars - blanks, row);
}

/* What a byte may be; of four lead bytes only the whole character tells. */
enum { IN_WORD, BLANK, LINE_END, PERHAPS_BLANK };
static const uint8_t KIND[256] = {
    [9] = BLANK, ['\n'] = LINE_END, [11] = BLANK, [12] = BLANK, [13] = BLANK, [28] = BLANK, [29] = BLANK, [30] = BLANK,
    [31] = BLANK, [' '] = BLANK, [0xC2] = PERHAPS_BLANK, [0xE1] = PERHAPS_BLANK, [0xE2] = PERHAPS_BLANK,
    [0xE3] = PERHAPS_BLANK,
};

/* How many bytes of white space, but no line end, begin here: 0 or one character. */
static size_t blank_at(const Work *work, const uint8_t *at) {
    uint8_t kind = KIND[*at];
    if (kind != PERHAPS_BLANK) return kind == BLANK;
    size_t bytes = 0;
    return work->classes[next_point(at, &bytes)] & SPACE ? bytes : 0;
}

/* Where the word that begins at `at` ends. Reads up to 8 bytes behind the text. */
static size_t word_end(const Work *work, const uint8_t *text, size_t at, size_t bytes) {
    const uint64_t ones = 0x0101010101010101u, high = 0x8080808080808080u;
    while (at < bytes) { /* 8 bytes of ASCII at once, to the first that is no more than a space */
        uint64_t eight = eight_bytes(text + at);
        uint64_t blank = (eight - 0x21 * ones) & high;
        if (eight & high) break;
        at += blank ? (size_t)__builtin_ctzll(blank) / 8 : 8;
        if (blank && KIND[text[at]] != IN_WORD) break;
        at += blank != 0;
    }
    while (at < bytes && (KIND[text[at]] == IN_WORD || (text[at] != '\n' && !blank_at(work, text + at)))) at++;
    return at < bytes ? at : bytes;
}

static int read_lines(Work *work, size_t at, size_t end, int32_t *row) {
    const uint8_t *text = work->text;
    while (at < end) {
        Line line = {0};
        size_t begin = at;
        while (at < end && text[at] != '\n') {
            size_t start = at, blank = blank_at(work, text + at);
            if (blank) {
                at += blank;
                continue;
            }
            at = word_end(work, text, at, end);
            if (!see_word(work, start, at, &line, row)) return 0;
        }
        see_line(work, text, begin, at, &line, row);
        if (at < end) {
            row[NEWLINES]++;
            at++;
        }
    }
    row[CHARS] += row[NEWLINES];
    return 1;
}

static void sum_words(const Work *work, int32_t *row) {
    for (size_t i = 0; i < work->own_count; i++) {
        const Word *word = work->words + work->own[i];
        int32_t count = word->count, lettered = (word->flags & LETTERED) != 0, plain = (word->flags & PLAIN_WORD) != 0;
        row[WORD_CHARS] += count * word->chars;
        row[LETTERS] += count * word->letters;
        row[DIGITS] += count * word->digits;
        row[UNSPACED_CHARS] += count * word->unspaced;
        row[HASHES] += count * word->hashes;
        row[ELLIPSES] += count * word->ellipses;
        row[LETTERED_WORDS] += count * lettered;
        row[PLAIN_WORDS] += count * plain;
        row[PLAIN_WORD_CHARS] += count * plain * word->chars;
        row[STOP_WORDS] += (word->flags & STOP_WORD) != 0;
        if (word->chars > row[LONGEST_WORD]) row[LONGEST_WORD] = word->chars;
    }
}

static int read_document(Work *work, size_t start, size_t end, int32_t *row) {
    if (!reserve(&work->before, &work->before_room, 1, sizeof *work->before)) return 0;
    work->own_count = 0;
    work->before[0] = 0;
    if (!read_lines(work, start, end, row)) return 0;
    sum_words(work, row);
    return count_ngrams(work, (size_t)row[WORDS], row) && count_parts(work, work->text + start, end - start, row);
}

/* Fills a row for each document; document d is text[first[d]] to text[first[d + 1]]. 0 without memory.
   Behind the last document there are 8 bytes more. */
EXPORT int lapis_statistics(const uint8_t *text, const int64_t *first, int32_t documents, const uint8_t *classes,
                            int32_t *rows) {
    static _Thread_local Work kept;
    Work *work = &kept;
    enum { FEWEST_SLOTS = 1024 };
    memset(rows, 0, (size_t)documents * COLUMNS * sizeof *rows);
    work->text = text;
    work->classes = classes;
    work->known = 0;
    if (!set_slots(work, FEWEST_SLOTS)) return 0;
    for (int32_t d = 0; d < documents; d++) {
        work->document = d;
        if (!read_document(work, (size_t)first[d], (size_t)first[d + 1], rows + (size_t)d * COLUMNS)) return 0;
    }
    return 1;
}

EXPORT int lapis_statistics_columns(void) { return COLUMNS; }

EXPORT const char *lapis_data_source(void) { return LAPIS_SOURCE; }
