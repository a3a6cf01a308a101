/* Text to ids: words are cut by the split pattern, and the ids of each word are remembered.
 *
 * Most words of a corpus repeat. A word of up to 15 bytes and up to 3 ids is one 32-byte slot; longer ones keep their
 * bytes and ids in pools. When the memory has grown to its limit it is emptied, so it is bounded for any corpus.
 */
#include "bpe_merge.h"

enum { SHORT_WORD = 15, LONG_WORD = 256, INLINE_IDS = 3 };
enum { FIRST_SLOTS = 1 << 14, MOST_WORDS = 1 << 20, MOST_POOL = 1 << 24 };

typedef struct {
    uint64_t key[2];          /* the bytes, with their number in the last one; of a long word its hash and its place */
    uint32_t count;           /* ids; 0: the slot is empty */
    uint32_t ids[INLINE_IDS]; /* where there are more, ids[0] is their place in the pool */
} word_slot;

typedef struct {
    word_slot *slots;
    uint64_t mask, used;
} word_table;

typedef struct {
    splitter split;
    pair_table pairs;
    uint32_t byte_ids[256];
    int32_t whole_words; /* a word that is an entry of the vocabulary is that entry, whatever the merges say */
    word_table words, entries;
    uint8_t *texts; /* of long words: 4 bytes of length before the bytes */
    uint32_t *ids;
    size_t text_used, text_kept, text_room, ids_used, ids_room;
    merge_space space;
} encoder;

static int table_start(word_table *table, uint64_t slots) {
    table->slots = calloc(slots, sizeof *table->slots);
    table->mask = slots - 1;
    table->used = 0;
    return table->slots != NULL;
}

static inline uint64_t slot_hash(const word_slot *slot) {
    return slot->key[1] >> 56 ? mix(slot->key[0], slot->key[1]) : slot->key[0];
}

static int table_grow(word_table *table) {
    word_table old = *table;
    if (!table_start(table, 2 * (old.mask + 1))) {
        *table = old;
        return 0;
    }
    for (uint64_t n = 0; n <= old.mask; n++) {
        if (!old.slots[n].count) continue;
        uint64_t place = slot_hash(old.slots + n) & table->mask;
        while (table->slots[place].count) place = (place + 1) & table->mask;
        table->slots[place] = old.slots[n];
    }
    table->used = old.used;
    free(old.slots);
    return 1;
}

/* A short word's key carries its length in the highest byte, which is 0 in that of a long one. Returns the hash. */
static inline uint64_t word_key(const uint8_t *p, size_t length, uint64_t key[2]) {
    if (length <= SHORT_WORD) {
        load_short(p, (unsigned)length, key);
        key[1] |= (uint64_t)length << 56;
        return mix(key[0], key[1]);
    }
    key[1] = 0;
    return key[0] = hash_bytes(p, length);
}

static inline int is_word(const encoder *self, const word_slot *slot, const uint64_t key[2], const uint8_t *p,
                          size_t length) {
    if (slot->key[0] != key[0]) return 0;
    if (length <= SHORT_WORD) return slot->key[1] == key[1];
    if (slot->key[1] >> 56) return 0;
    uint32_t known;
    memcpy(&known, self->texts + slot->key[1], 4);
    return known == length && !memcmp(self->texts + slot->key[1] + 4, p, length);
}

static inline word_slot *find(const encoder *self, const word_table *table, uint64_t hash, const uint64_t key[2],
                              const uint8_t *p, size_t length) {
    uint64_t place = hash & table->mask;
    while (table->slots[place].count && !is_word(self, table->slots + place, key, p, length))
        place = (place + 1) & table->mask;
    return table->slots + place;
}

static int reserve(void **pool, size_t *room, size_t wanted, size_t size) {
    if (wanted <= *room) return 1;
    size_t grown = *room ? *room : 1 << 12;
    while (grown < wanted) grown *= 2;
    void *moved = realloc(*pool, grown * size);
    if (!moved) return 0;
    *pool = moved;
    *room = grown;
    return 1;
}

/* Puts a word with its ids into a table, which does not hold it yet; 0 without memory. */
static int remember(encoder *self, word_table *table, const uint8_t *p, size_t length, const uint32_t *ids,
                    size_t count) {
    word_slot made = {.count = (uint32_t)count};
    uint64_t hash = word_key(p, length, made.key);
    if (length > SHORT_WORD) {
        uint32_t stored = (uint32_t)length;
        if (!reserve((void **)&self->texts, &self->text_room, self->text_used + 4 + length, 1)) return 0;
        made.key[1] = self->text_used;
        memcpy(self->texts + self->text_used, &stored, 4);
        memcpy(self->texts + self->text_used + 4, p, length);
        self->text_used += 4 + length;
    }
    if (count <= INLINE_IDS) {
        memcpy(made.ids, ids, count * sizeof *ids);
    } else {
        if (!reserve((void **)&self->ids, &self->ids_room, self->ids_used + count, sizeof *ids)) return 0;
        made.ids[0] = (uint32_t)self->ids_used;
        memcpy(self->ids + self->ids_used, ids, count * sizeof *ids);
        self->ids_used += count;
    }
    uint64_t place = hash & table->mask;
    while (table->slots[place].count) place = (place + 1) & table->mask;
    table->slots[place] = made;
    return ++table->used * 2 <= table->mask || table_grow(table);
}

static void forget(encoder *self) {
    memset(self->words.slots, 0, (self->words.mask + 1) * sizeof *self->words.slots);
    self->words.used = self->ids_used = 0;
    self->text_used = self->text_kept;
}

/* The ids of a word that is not remembered, into `out`; how many, or -1 without memory. */
static int64_t miss(encoder *self, const uint8_t *p, size_t length, uint32_t *out) {
    if (self->whole_words) {
        uint64_t key[2], hash = word_key(p, length, key);
        const word_slot *entry = find(self, &self->entries, hash, key, p, length);
        if (entry->count) return out[0] = entry->ids[0], 1;
    }
    for (size_t n = 0; n < length; n++) out[n] = self->byte_ids[p[n]];
    int64_t count = lapis_merge(&self->pairs, out, length, &self->space);
    if (count < 0 || length > LONG_WORD) return count;
    if (self->words.used >= MOST_WORDS || self->text_used - self->text_kept >= MOST_POOL || self->ids_used >= MOST_POOL)
        forget(self);
    return remember(self, &self->words, p, length, out, (size_t)count) ? count : -1;
}

static int64_t encode_text(encoder *self, const uint8_t *p, const uint8_t *end, uint32_t *out) {
    uint32_t *first = out;
    while (p < end) {
        const uint8_t *piece = lapis_piece_end(&self->split, p, end);
        while (p < piece) {
            const uint8_t *next = lapis_word_end(&self->split, p, piece);
            size_t length = (size_t)(next - p);
            uint64_t key[2], hash = word_key(p, length, key);
            const word_slot *slot = find(self, &self->words, hash, key, p, length);
            if (slot->count) {
                const uint32_t *ids = slot->count <= INLINE_IDS ? slot->ids : self->ids + slot->ids[0];
                for (uint32_t n = 0; n < slot->count; n++) out[n] = ids[n];
                out += slot->count;
            } else {
                int64_t count = miss(self, p, length, out);
                if (count < 0) return -1;
                out += count;
            }
            p = next;
        }
    }
    return out - first;
}

/* Encodes texts that lie one after the other, each up to ends[n]; their ids lie in `out` up to out_ends[n].
 *
 * `prefix` goes before each text unless it is negative. `out` has room for an id a byte and one a text; PADDING
 * bytes behind the last text are readable. Returns the number of ids, or -1 without memory. */
EXPORT int64_t lapis_bpe_encode(encoder *self, const uint8_t *text, const int64_t *ends, int64_t texts, int64_t prefix,
                                uint32_t *out, int64_t *out_ends) {
    int64_t begin = 0, total = 0;
    for (int64_t n = 0; n < texts; n++) {
        if (prefix >= 0) out[total++] = (uint32_t)prefix;
        int64_t count = encode_text(self, text + begin, text + ends[n], out + total);
        if (count < 0) return -1;
        out_ends[n] = total += count;
        begin = ends[n];
    }
    return total;
}

EXPORT void lapis_bpe_free(encoder *self) {
    if (!self) return;
    free(self->pairs.slots);
    free(self->words.slots);
    free(self->entries.slots);
    free(self->texts);
    free(self->ids);
    lapis_merge_free(&self->space);
    free(self);
}

static int fill_pairs(pair_table *table, const uint32_t *merges, int64_t count) {
    uint64_t slots = 1024;
    while (slots < 3 * (uint64_t)count) slots *= 2;
    table->slots = malloc(slots * sizeof *table->slots);
    table->mask = slots - 1;
    if (!table->slots) return 0;
    for (uint64_t n = 0; n < slots; n++) table->slots[n] = (pair_slot){0, NO_RANK};
    for (int64_t n = 0; n < count; n++, merges += 3) {
        uint64_t pair = (uint64_t)merges[0] << 32 | merges[1], place = mix(pair, 0) & table->mask;
        while (table->slots[place].rank != NO_RANK && table->slots[place].pair != pair) place = (place + 1) & table->mask;
        table->slots[place] = (pair_slot){pair, (uint64_t)n << 32 | merges[2]}; /* the last of equal pairs counts */
    }
    return 1;
}

/* An encoder, or NULL without memory. merges: left, right and resulting id of each, in the order of their ranks.
 *
 * entries: words that are one id, up to entry_ends[n] of entry_bytes (with PADDING), with the ids entry_ids. */
EXPORT encoder *lapis_bpe_new(const splitter *split, const uint32_t *byte_ids, const uint32_t *merges, int64_t merge_count,
                              const uint8_t *entry_bytes, const int64_t *entry_ends, const uint32_t *entry_ids,
                              int64_t entry_count) {
    encoder *self = calloc(1, sizeof *self);
    if (!self) return NULL;
    self->split = *split;
    self->whole_words = entry_count > 0;
    memcpy(self->byte_ids, byte_ids, sizeof self->byte_ids);
    int done = table_start(&self->words, FIRST_SLOTS) && table_start(&self->entries, FIRST_SLOTS) &&
               fill_pairs(&self->pairs, merges, merge_count);
    int64_t begin = 0;
    for (int64_t n = 0; done && n < entry_count; begin = entry_ends[n++])
        done = remember(self, &self->entries, entry_bytes + begin, (size_t)(entry_ends[n] - begin), entry_ids + n, 1);
    self->text_kept = self->text_used;
    if (done) return self;
    lapis_bpe_free(self);
    return NULL;
}
