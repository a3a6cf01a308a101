/* The statistics of one document: the columns, and what the files that fill them share. */
#ifndef LAPIS_STATISTICS_H
#define LAPIS_STATISTICS_H

#include "text.h"

/* as COLUMNS of statistics.py, in the same order */
enum {
    CHARS, NEWLINES, WORDS, PLAIN_WORDS, PLAIN_WORD_CHARS, LONGEST_WORD, LETTERED_WORDS, STOP_WORDS, HASHES, ELLIPSES,
    WORD_CHARS, LETTERS, DIGITS, UNSPACED_CHARS,
    LINES, BULLET_LINES, ELLIPSIS_LINES, FILLED_LINES, ENDED_LINES, SHORT_LINES, LONGEST_LINE,
    LINE_PIECES, DUPLICATE_LINES, DUPLICATE_LINE_CHARS, DUPLICATE_FILLED_CHARS,
    PARAGRAPHS, DUPLICATE_PARAGRAPHS, DUPLICATE_PARAGRAPH_CHARS,
    TOP_2GRAM, TOP_3GRAM, TOP_4GRAM,
    DUPLICATE_5GRAMS, DUPLICATE_6GRAMS, DUPLICATE_7GRAMS, DUPLICATE_8GRAMS, DUPLICATE_9GRAMS, DUPLICATE_10GRAMS,
    C4_LONG_WORD, C4_UNENDED, C4_FEW_WORDS, C4_JAVASCRIPT, C4_POLICY, C4_LOREM_IPSUM, C4_CURLY,
    C4_LINES, C4_CHARS, C4_SENTENCES,
    C4_ANY_LOREM_IPSUM, C4_ANY_CURLY, C4_ANY_LINES, C4_ANY_CHARS, C4_ANY_SENTENCES,
    COLUMNS
};

/* One distinct word of some documents: first what every occurrence asks for, all in all 64 bytes. */
typedef struct {
    uint64_t hash;
    int64_t start;
    int32_t bytes, chars;
    int32_t document, count; /* how often it occurs in the document it was last met in */
    int32_t ends;            /* sentences that end inside it, with more behind */
    uint32_t flags;
    int32_t letters, digits, unspaced, hashes, ellipses, unused;
} Word;

/* One part (a line, a paragraph) that was seen in a document. */
typedef struct {
    uint64_t hash;
    int32_t start, bytes;
} Seen;

/* One distinct n-gram: the pair of the numbers of both (n-1)-grams in it. */
typedef struct {
    uint64_t pair;
    int32_t count, met;
} Gram;

/* What is kept from one document to the next, and in each thread from one call to the next: words and memory. */
typedef struct {
    const uint8_t *text, *classes;
    Word *words;
    int32_t *slots;  /* of the words' table: 1 + place in `words`, 0 for empty */
    int32_t *own;    /* the distinct words of the document */
    int32_t *id_of;  /* for each of its occurrences the distinct word */
    int32_t *before; /* characters of the words before each occurrence */
    Seen *parts;
    int32_t *gram_of, *at;
    Gram *grams;
    size_t words_room, slots_room, own_room, id_room, before_room, parts_room, gram_of_room, at_room, grams_room;
    size_t known, own_count, mask;
    int32_t document;
} Work;

int count_ngrams(Work *work, size_t words, int32_t *row);
int count_parts(Work *work, const uint8_t *text, size_t bytes, int32_t *row);

#endif
