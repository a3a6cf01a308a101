/* Which language a text is in, by a fastText model (arXiv 1612.03651): sums of the vectors of words and of their
   character n-grams, then the leaves of a Huffman tree.

   The sum of a word is kept for the next time it occurs. It depends on nothing but the word, and a text's sum is taken
   word by word, so the result does not depend on what was read before. */
#include "text.h"

enum { DIM = 16, CACHED = 4096, CACHED_BYTES = 24, LEAST = 2, MOST = 4 }; /* characters of an n-gram */

/* as in language.py */
typedef struct {
    int32_t words, labels, bucket, mask; /* mask: slots of the table of words, minus 1 */
    const uint8_t *text;                 /* of all words */
    const int64_t *first;                /* words + 1 numbers */
    const int32_t *slots;                /* 1 + word, 0 for empty; by FNV hash */
    const uint64_t *kept;                /* a bit for each n-gram bucket that has a vector */
    const int32_t *before;               /* how many have one before each 64 of them */
    const float *rows;                   /* vectors of words, then of those buckets */
    const float *nodes;                  /* vectors of the inner nodes */
    const int32_t *children;             /* left and right of each inner node; leaves are labels */
} Model;

typedef struct {
    float sum[DIM];
    int32_t count, bytes; /* vectors in the sum; bytes of the word, 0 for an empty place */
    uint8_t word[CACHED_BYTES];
} Known;

static uint32_t fnv(uint32_t hash, uint8_t byte) {
    return (hash ^ (byte < 0x80 ? byte : 0xFFFFFF00u | byte)) * 16777619u; /* bytes count as signed */
}

static void add(float *sum, const float *row) {
    for (int i = 0; i < DIM; i++) sum[i] += row[i];
}

static int32_t bits_below(uint64_t bits, unsigned place) {
    bits &= ((uint64_t)1 << place) - 1;
    bits -= bits >> 1 & 0x5555555555555555u;
    bits = (bits & 0x3333333333333333u) + (bits >> 2 & 0x3333333333333333u);
    return (int32_t)(((bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0Fu) * 0x0101010101010101u >> 56);
}

static void add_ngram(const Model *model, uint32_t hash, Known *known) {
    uint32_t bucket = hash % (uint32_t)model->bucket, group = bucket / 64, place = bucket % 64;
    if (!(model->kept[group] >> place & 1)) return;
    add(known->sum, model->rows + (size_t)(model->words + model->before[group] + bits_below(model->kept[group], place)) * DIM);
    known->count++;
}

static void add_listed(const Model *model, const uint8_t *word, size_t bytes, Known *known) {
    uint32_t hash = 2166136261u;
    for (size_t i = 0; i < bytes; i++) hash = fnv(hash, word[i]);
    for (uint32_t slot = hash & (uint32_t)model->mask; model->slots[slot]; slot = (slot + 1) & (uint32_t)model->mask) {
        int32_t id = model->slots[slot] - 1;
        const int64_t *first = model->first + id;
        if (first[1] - first[0] == (int64_t)bytes && !memcmp(model->text + first[0], word, bytes)) {
            add(known->sum, model->rows + (size_t)id * DIM);
            known->count++;
            return;
        }
    }
}

/* The sum of a word's own vector, if it has one, and those of its n-grams between < and >. */
static void measure(const Model *model, const uint8_t *word, size_t bytes, Known *known) {
    size_t end = bytes + 2;
#define BYTE(i) ((i) == 0 ? '<' : (i) == end - 1 ? '>' : word[(i) - 1])
    memset(known->sum, 0, sizeof known->sum);
    known->count = 0;
    add_listed(model, word, bytes, known);
    for (size_t start = 0; start < end; start++) {
        uint8_t byte = BYTE(start);
        if ((byte & 0xC0) == 0x80) continue;
        uint32_t hash = 2166136261u;
        size_t at = start;
        for (int chars = 1; at < end && chars <= MOST; chars++) {
            do {
                hash = fnv(hash, byte);
                byte = ++at < end ? BYTE(at) : 0;
            } while ((byte & 0xC0) == 0x80);
            if (chars >= LEAST) add_ngram(model, hash, known);
        }
    }
#undef BYTE
}

/* e to the power of x by additions and multiplications alone, so that it is the same on every machine. */
static double power_of_e(double x) {
    x = x > 700 ? 700 : x < -700 ? -700 : x;
    int64_t twos = (int64_t)(x * 1.4426950408889634 + (x < 0 ? -0.5 : 0.5));
    double rest = x - (double)twos * 0.693147180369123816490 - (double)twos * 1.90821492927058770002e-10, sum = 1;
    for (int n = 14; n > 0; n--) sum = 1 + sum * rest / n;
    uint64_t bits = (uint64_t)(twos + 1023) << 52;
    double power;
    memcpy(&power, &bits, sizeof power);
    return sum * power;
}

/* The best leaf and its probability. Nodes are numbered as fastText does: leaves first, the root last. */
static void best_label(const Model *model, const float *hidden, int32_t *label, float *score) {
    enum { MOST_NODES = 2048 };
    double chance[MOST_NODES];
    int32_t leaves = model->labels;
    chance[2 * leaves - 2] = 1;
    for (int32_t node = 2 * leaves - 2; node >= leaves; node--) {
        const float *weights = model->nodes + (size_t)(node - leaves) * DIM;
        double dot = 0;
        for (int i = 0; i < DIM; i++) dot += (double)hidden[i] * (double)weights[i];
        double right = 1 / (1 + power_of_e(-dot));
        const int32_t *child = model->children + 2 * (size_t)(node - leaves);
        chance[child[0]] = chance[node] * (1 - right + 1e-5); /* as fastText guards its logarithms */
        chance[child[1]] = chance[node] * (right + 1e-5);
    }
    int32_t best = 0;
    for (int32_t leaf = 1; leaf < leaves; leaf++)
        if (chance[leaf] > chance[best]) best = leaf;
    *label = best;
    *score = chance[best] > 1 ? 1 : (float)chance[best];
}

static const Known *look_up(const Model *model, Known *cache, Known *unkept, const uint8_t *word, size_t bytes) {
    if (bytes > CACHED_BYTES) {
        measure(model, word, bytes, unkept);
        return unkept;
    }
    Known *known = cache + ((size_t)hash_bytes(word, bytes) & (CACHED - 1));
    if ((size_t)known->bytes != bytes || memcmp(known->word, word, bytes)) {
        measure(model, word, bytes, known);
        known->bytes = (int32_t)bytes;
        memcpy(known->word, word, bytes);
    }
    return known;
}

static int is_separator(uint8_t byte) { return byte == ' ' || (byte >= 9 && byte <= 13) || !byte; }

/* Label and score of each document; document d is text[first[d]] to text[first[d + 1]], with 8 bytes more behind all.
   0 without memory. */
EXPORT int lapis_language(const Model *model, const uint8_t *text, const int64_t *first, int32_t documents,
                          int32_t *labels, float *scores) {
    Known *cache = calloc(CACHED, sizeof *cache), unkept;
    if (!cache) return 0;
    for (int32_t d = 0; d < documents; d++) {
        float sum[DIM];
        int64_t count = 1; /* the end of the line is word 0 of the model */
        memset(sum, 0, sizeof sum);
        for (int64_t at = first[d]; at < first[d + 1];) {
            int64_t start = at;
            while (at < first[d + 1] && !is_separator(text[at])) at++;
            if (at > start) {
                const Known *known = look_up(model, cache, &unkept, text + start, (size_t)(at - start));
                add(sum, known->sum);
                count += known->count;
            }
            at++;
        }
        add(sum, model->rows);
        for (int i = 0; i < DIM; i++) sum[i] = (float)((double)sum[i] / (double)count);
        best_label(model, sum, labels + d, scores + d);
    }
    free(cache);
    return 1;
}
