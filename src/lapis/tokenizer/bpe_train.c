/* Learns byte pair merges: the pair that occurs most often in the words of the texts, again and again.
 *
 * The order is that of Hugging Face `tokenizers`: of pairs that occur equally often the one with the smallest ids
 * comes first. A pair waits in the queue with the words in which it came up; one that comes up again later, as
 * happens where two pairs make the same string, waits once more, with the words of that time.
 */
#include "bpe.h"

typedef struct {
    uint64_t hash;
    uint64_t text; /* where its bytes begin in the counter's pool */
    int64_t count;
    uint32_t length;
} counted_word;

typedef struct {
    counted_word *words;
    uint32_t *slots; /* number of a word + 1; 0: empty */
    uint8_t *pool;
    uint64_t word_count, word_room, mask, pool_used, pool_room;
} counter;

static int grow(void **items, uint64_t *room, uint64_t wanted, size_t size) {
    if (wanted <= *room) return 1;
    uint64_t grown = *room ? *room : 1 << 12;
    while (grown < wanted) grown *= 2;
    void *moved = realloc(*items, grown * size);
    if (!moved) return 0;
    *items = moved;
    *room = grown;
    return 1;
}

EXPORT void lapis_words_free(counter *self) {
    if (!self) return;
    free(self->words);
    free(self->slots);
    free(self->pool);
    free(self);
}

EXPORT counter *lapis_words_new(void) {
    counter *self = calloc(1, sizeof *self);
    if (!self) return NULL;
    self->mask = (1 << 16) - 1;
    self->slots = calloc(self->mask + 1, sizeof *self->slots);
    if (self->slots) return self;
    free(self);
    return NULL;
}

static int rehash(counter *self) {
    uint64_t mask = 2 * self->mask + 1;
    uint32_t *slots = calloc(mask + 1, sizeof *slots);
    if (!slots) return 0;
    for (uint64_t n = 0; n < self->word_count; n++) {
        uint64_t place = self->words[n].hash & mask;
        while (slots[place]) place = (place + 1) & mask;
        slots[place] = (uint32_t)n + 1;
    }
    free(self->slots);
    self->slots = slots;
    self->mask = mask;
    return 1;
}

/* The number of a word, which is added with count 0 if it is new; -1 without memory. */
static int64_t word_number(counter *self, const uint8_t *p, size_t length) {
    uint64_t hash = hash_bytes(p, length), place = hash & self->mask;
    for (; self->slots[place]; place = (place + 1) & self->mask) {
        const counted_word *word = self->words + self->slots[place] - 1;
        if (word->hash == hash && word->length == length && !memcmp(self->pool + word->text, p, length))
            return self->slots[place] - 1;
    }
    if (length >= UINT32_MAX || self->word_count >= UINT32_MAX - 1) return -1;
    if (!grow((void **)&self->words, &self->word_room, self->word_count + 1, sizeof *self->words) ||
        !grow((void **)&self->pool, &self->pool_room, self->pool_used + length + PADDING, 1))
        return -1;
    self->words[self->word_count] = (counted_word){hash, self->pool_used, 0, (uint32_t)length};
    memcpy(self->pool + self->pool_used, p, length);
    self->pool_used += length;
    self->slots[place] = (uint32_t)++self->word_count;
    if (self->word_count * 2 > self->mask && !rehash(self)) return -1;
    return (int64_t)self->word_count - 1;
}

/* Counts the words of texts that lie one after the other, each up to ends[n]; 0 without memory. */
EXPORT int32_t lapis_words_add(counter *self, const splitter *split, const uint8_t *text, const int64_t *ends,
                               int64_t texts) {
    const uint8_t *p = text;
    for (int64_t n = 0; n < texts; n++) {
        const uint8_t *end = text + ends[n];
        while (p < end) {
            const uint8_t *piece = lapis_piece_end(split, p, end);
            while (p < piece) {
                const uint8_t *next = lapis_word_end(split, p, piece);
                int64_t number = word_number(self, p, (size_t)(next - p));
                if (number < 0) return 0;
                self->words[number].count++;
                p = next;
            }
        }
    }
    return 1;
}

typedef struct {
    uint64_t pair; /* left id << 32 | right id */
    int64_t count;
    uint64_t list;  /* of the merge at hand: where the pair's words begin in `places` */
    uint32_t merge; /* the merge in which the pair came up last */
    uint32_t last;  /* word of this merge that was noted last */
    uint32_t noted; /* words of this merge */
} pair_count;

typedef struct {
    int64_t count;
    uint64_t pair, list;
    uint32_t index, words;
} waiting;

typedef struct {
    uint32_t pair, word;
} note;

typedef struct {
    uint32_t *symbols; /* of all words */
    uint64_t *begins;
    uint32_t *lengths;
    pair_count *pairs;
    uint32_t *slots; /* number of a pair + 1 */
    waiting *queue;
    uint32_t *places, *touched;
    note *notes;
    uint64_t pair_used, pair_room, mask, queue_used, queue_room, place_used, place_room;
    uint64_t touched_used, touched_room, note_used, note_room;
    uint32_t merge;
} trainer;

static int pairs_rehash(trainer *self) {
    uint64_t mask = self->mask ? 2 * self->mask + 1 : (1 << 16) - 1;
    uint32_t *slots = calloc(mask + 1, sizeof *slots);
    if (!slots) return 0;
    for (uint64_t n = 0; n < self->pair_used; n++) {
        uint64_t place = mix(self->pairs[n].pair, 0) & mask;
        while (slots[place]) place = (place + 1) & mask;
        slots[place] = (uint32_t)n + 1;
    }
    free(self->slots);
    self->slots = slots;
    self->mask = mask;
    return 1;
}

static pair_count *pair_of(trainer *self, uint32_t left, uint32_t right) {
    uint64_t pair = (uint64_t)left << 32 | right, place = mix(pair, 0) & self->mask;
    for (; self->slots[place]; place = (place + 1) & self->mask)
        if (self->pairs[self->slots[place] - 1].pair == pair) return self->pairs + self->slots[place] - 1;
    if (self->pair_used >= UINT32_MAX - 1 ||
        !grow((void **)&self->pairs, &self->pair_room, self->pair_used + 1, sizeof *self->pairs))
        return NULL;
    self->pairs[self->pair_used] = (pair_count){.pair = pair};
    self->slots[place] = (uint32_t)++self->pair_used;
    if (self->pair_used * 2 > self->mask && !pairs_rehash(self)) return NULL;
    return self->pairs + self->pair_used - 1;
}

/* A pair occurs `change` times more; where that is more than before, the word is noted, once. */
static int change_pair(trainer *self, uint32_t left, uint32_t right, int64_t change, uint32_t word) {
    pair_count *pair = pair_of(self, left, right);
    if (!pair) return 0;
    pair->count += change;
    if (change <= 0) return 1;
    uint32_t index = (uint32_t)(pair - self->pairs);
    if (pair->merge != self->merge) {
        if (!grow((void **)&self->touched, &self->touched_room, self->touched_used + 1, sizeof *self->touched)) return 0;
        self->touched[self->touched_used++] = index;
        pair->merge = self->merge;
        pair->noted = 0;
    }
    if (pair->noted && pair->last == word) return 1;
    if (!grow((void **)&self->notes, &self->note_room, self->note_used + 1, sizeof *self->notes)) return 0;
    self->notes[self->note_used++] = (note){index, word};
    pair->last = word;
    pair->noted++;
    return 1;
}

static inline int comes_before(const waiting *a, const waiting *b) {
    return a->count != b->count ? a->count > b->count : a->pair < b->pair;
}

static int enqueue(trainer *self, waiting entry) {
    if (!grow((void **)&self->queue, &self->queue_room, self->queue_used + 1, sizeof *self->queue)) return 0;
    uint64_t n = self->queue_used++;
    for (; n && comes_before(&entry, self->queue + (n - 1) / 2); n = (n - 1) / 2)
        self->queue[n] = self->queue[(n - 1) / 2];
    self->queue[n] = entry;
    return 1;
}

/* Puts an entry in place of the first one, and lets it sink. */
static void replace_first(trainer *self, waiting entry) {
    waiting *queue = self->queue;
    uint64_t n = 0, size = self->queue_used;
    for (uint64_t child; (child = 2 * n + 1) < size; n = child) {
        if (child + 1 < size && comes_before(queue + child + 1, queue + child)) child++;
        if (!comes_before(queue + child, &entry)) break;
        queue[n] = queue[child];
    }
    queue[n] = entry;
}

/* Lets the pairs that came up in this merge wait, each with its words. */
static int queue_touched(trainer *self) {
    if (!grow((void **)&self->places, &self->place_room, self->place_used + self->note_used, sizeof *self->places))
        return 0;
    for (uint64_t n = 0; n < self->touched_used; n++) {
        pair_count *pair = self->pairs + self->touched[n];
        pair->list = self->place_used;
        if (pair->count <= 0) continue;
        self->place_used += pair->noted;
        if (!enqueue(self, (waiting){pair->count, pair->pair, pair->list, self->touched[n], pair->noted})) return 0;
    }
    for (uint64_t n = 0; n < self->note_used; n++) {
        pair_count *pair = self->pairs + self->notes[n].pair;
        if (pair->count > 0) self->places[pair->list++] = self->notes[n].word;
    }
    self->touched_used = self->note_used = 0;
    return 1;
}

static int merge_word(trainer *self, uint32_t word, uint32_t left, uint32_t right, uint32_t made, int64_t count) {
    uint32_t *symbols = self->symbols + self->begins[word], length = self->lengths[word], kept = 0;
    for (uint32_t n = 0; n < length;) {
        if (symbols[n] != left || n + 1 >= length || symbols[n + 1] != right) {
            symbols[kept++] = symbols[n++];
            continue;
        }
        if (kept && !(change_pair(self, symbols[kept - 1], left, -count, word) &&
                      change_pair(self, symbols[kept - 1], made, count, word)))
            return 0;
        symbols[kept++] = made;
        n += 2;
        if (n < length && !(change_pair(self, right, symbols[n], -count, word) &&
                            change_pair(self, made, symbols[n], count, word)))
            return 0;
    }
    self->lengths[word] = kept;
    return 1;
}

static int start(trainer *self, const counter *words, const uint32_t *byte_ids) {
    self->symbols = malloc((words->pool_used + 1) * sizeof *self->symbols);
    self->begins = malloc((words->word_count + 1) * sizeof *self->begins);
    self->lengths = malloc((words->word_count + 1) * sizeof *self->lengths);
    if (!self->symbols || !self->begins || !self->lengths || !pairs_rehash(self)) return 0;
    for (uint64_t n = 0; n < words->pool_used; n++) self->symbols[n] = byte_ids[words->pool[n]];
    self->merge = 1;
    for (uint64_t word = 0; word < words->word_count; word++) {
        const counted_word *counted = words->words + word;
        self->begins[word] = counted->text;
        self->lengths[word] = counted->length;
        const uint32_t *symbols = self->symbols + counted->text;
        for (uint32_t n = 0; n + 1 < counted->length; n++)
            if (!change_pair(self, symbols[n], symbols[n + 1], counted->count, (uint32_t)word)) return 0;
    }
    return queue_touched(self);
}

/* The id of left and right together, which is a new one where no entry has these bytes; -1 without memory. */
static int64_t joined(counter *entries, uint32_t left, uint32_t right) {
    const counted_word *a = entries->words + left, *b = entries->words + right;
    size_t length = (size_t)a->length + b->length;
    uint8_t *bytes = malloc(length + PADDING);
    if (!bytes) return -1;
    memcpy(bytes, entries->pool + a->text, a->length);
    memcpy(bytes + a->length, entries->pool + b->text, b->length);
    int64_t id = word_number(entries, bytes, length);
    free(bytes);
    return id;
}

static int64_t learn(trainer *self, const counter *words, counter *entries, uint64_t vocab_size, uint32_t *merges,
                     int64_t room) {
    int64_t made = 0;
    while (entries->word_count < vocab_size && self->queue_used && made < room) {
        waiting top = self->queue[0];
        const pair_count *pair = self->pairs + top.index;
        if (top.count != pair->count) {
            top.count = pair->count;
            replace_first(self, top);
            continue;
        }
        if (top.count < 1) break;
        replace_first(self, self->queue[--self->queue_used]);
        uint32_t left = (uint32_t)(top.pair >> 32), right = (uint32_t)top.pair;
        int64_t id = joined(entries, left, right);
        if (id < 0) return -1;
        merges[3 * made] = left;
        merges[3 * made + 1] = right;
        merges[3 * made++ + 2] = (uint32_t)id;
        self->merge++;
        for (uint64_t n = top.list; n < top.list + top.words; n++) {
            uint32_t word = self->places[n];
            if (!merge_word(self, word, left, right, (uint32_t)id, words->words[word].count)) return -1;
        }
        if (!queue_touched(self)) return -1;
    }
    return made;
}

/* Merges (left, right, resulting id) into `merges`, until there are vocab_size entries or no pair is left.
 *
 * entries: the bytes of the entries there are before, up to entry_ends[n], which have the ids 0, 1, …; byte_ids are
 * those of the single bytes. Returns the number of merges, at most `room`, or -1 without memory. */
EXPORT int64_t lapis_words_train(const counter *words, const uint8_t *entry_bytes, const int64_t *entry_ends,
                                 int64_t entry_count, const uint32_t *byte_ids, int64_t vocab_size, uint32_t *merges,
                                 int64_t room) {
    trainer self = {0};
    counter *entries = lapis_words_new();
    int done = entries != NULL;
    for (int64_t n = 0, begin = 0; done && n < entry_count; begin = entry_ends[n++])
        done = word_number(entries, entry_bytes + begin, (size_t)(entry_ends[n] - begin)) == n;
    int64_t made = done && start(&self, words, byte_ids)
                       ? learn(&self, words, entries, (uint64_t)vocab_size, merges, room)
                       : -1;
    lapis_words_free(entries);
    void *owned[] = {self.symbols, self.begins, self.lengths, self.pairs, self.slots,
                     self.queue,   self.places, self.touched, self.notes};
    for (size_t n = 0; n < sizeof owned / sizeof *owned; n++) free(owned[n]);
    return made;
}
