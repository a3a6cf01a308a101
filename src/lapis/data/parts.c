/* Lines and paragraphs that an earlier one equals. */
#include "statistics.h"

/* Whether a part was seen before; if not, it is from now on. The table has more slots than there are parts. */
static int seen(Work *work, const uint8_t *text, size_t mask, size_t start, size_t bytes) {
    uint64_t hash = hash_bytes(text + start, bytes);
    size_t slot = (size_t)hash & mask;
    for (; work->parts[slot].start >= 0; slot = (slot + 1) & mask) {
        const Seen *part = work->parts + slot;
        if (part->hash == hash && (size_t)part->bytes == bytes && !memcmp(text + part->start, text + start, bytes))
            return 1;
    }
    work->parts[slot] = (Seen){hash, (int32_t)start, (int32_t)bytes};
    return 0;
}

static int empty_table(Work *work, size_t most, size_t *mask) {
    size_t slots = 32;
    while (slots < 2 * most) slots *= 2;
    if (!reserve(&work->parts, &work->parts_room, slots, sizeof *work->parts)) return 0;
    memset(work->parts, 0xFF, slots * sizeof *work->parts);
    *mask = slots - 1;
    return 1;
}

/* Bytes of white space where `text` begins, at most `bytes`. */
static size_t blank_before(const Work *work, const uint8_t *text, size_t bytes) {
    size_t at = 0;
    while (at < bytes) {
        size_t next = at;
        if (!(work->classes[next_point(text, &next)] & SPACE)) break;
        at = next;
    }
    return at;
}

/* Where the text ends without the white space behind it; not before `start`. */
static size_t without_blank_after(const Work *work, const uint8_t *text, size_t start, size_t end) {
    while (end > start) {
        size_t last = end - 1;
        while (last > start && (text[last] & 0xC0) == 0x80) last--;
        size_t next = last;
        if (!(work->classes[next_point(text, &next)] & SPACE)) break;
        end = last;
    }
    return end;
}

static int count_lines(Work *work, const uint8_t *text, size_t bytes, int32_t *row) {
    size_t mask, pieces = 0, start = 0;
    if (!empty_table(work, (size_t)row[NEWLINES] + 1, &mask)) return 0;
    while (start < bytes) {
        const uint8_t *found = memchr(text + start, '\n', bytes - start);
        size_t end = found ? (size_t)(found - text) : bytes;
        if (end > start) {
            pieces++;
            if (seen(work, text, mask, start, end - start)) {
                int32_t chars = count_chars(text + start, end - start);
                row[DUPLICATE_LINES]++;
                row[DUPLICATE_LINE_CHARS] += chars;
                if (blank_before(work, text + start, end - start) < end - start) row[DUPLICATE_FILLED_CHARS] += chars;
            }
        }
        start = end + 1;
    }
    /* what a split at runs of line ends gives: an empty piece at either end of a text that begins or ends with one */
    int open = bytes && text[0] == '\n', closed = bytes && text[bytes - 1] == '\n';
    int whole = !pieces && bytes; /* nothing but line ends */
    row[LINE_PIECES] = (int32_t)pieces + (whole ? 2 : open + closed) + !bytes;
    row[DUPLICATE_LINES] += whole || (open && closed);
    return 1;
}

static int count_paragraphs(Work *work, const uint8_t *text, size_t bytes, int32_t *row) {
    size_t mask, all = bytes, start = blank_before(work, text, bytes);
    bytes = without_blank_after(work, text, start, bytes);
    row[PARAGRAPHS] = start >= bytes; /* of no text: one, empty */
    /* no line occurs twice, then no paragraph does, if those at the ends are whole lines too */
    int none = !row[DUPLICATE_LINES] && (!start || text[start - 1] == '\n') && (bytes == all || text[bytes] == '\n');
    if (!none && !empty_table(work, (size_t)row[NEWLINES] / 2 + 1, &mask)) return 0;
    while (start < bytes) {
        size_t end = start;
        for (;;) { /* to the next two line ends in a row */
            const uint8_t *found = memchr(text + end, '\n', bytes - end);
            end = found ? (size_t)(found - text) : bytes;
            if (end == bytes || text[end + 1] == '\n') break; /* a stripped text does not end with one */
            end++;
        }
        row[PARAGRAPHS]++;
        if (!none && seen(work, text, mask, start, end - start)) {
            row[DUPLICATE_PARAGRAPHS]++;
            row[DUPLICATE_PARAGRAPH_CHARS] += count_chars(text + start, end - start);
        }
        start = end;
        while (start < bytes && text[start] == '\n') start++;
    }
    return 1;
}

int count_parts(Work *work, const uint8_t *text, size_t bytes, int32_t *row) {
    return count_lines(work, text, bytes, row) && count_paragraphs(work, text, bytes, row);
}
