/* Attention of one query position on rows of latents: numbers, and codes unpacked in registers.
 *
 *     score_t = gain_t Σ_j q_j (code_tj + ½) + Σ_i q_i number_ti        over the columns of the key
 *     out_j   = Σ_t w_t gain_t (code_tj + ½),  out_i = Σ_t w_t number_ti           of the value
 *
 * A tile of tokens at a time stays in the first cache: scores, the softmax so far, weighted sums.
 * Columns are handled W at a time, codes as the numbers they are, whole and unsigned but for those
 * of 8 bits; what a code is short of its value is the same for all tokens, and added once. All sums
 * are in fp32. Compiled once per instruction set, see compiled.py; nothing here but vectors of W.
 */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define W 16
#elif defined(__AVX2__)
#define W 8
#else
#define W 4
#endif

#define TILE 64        /* tokens */
#define GROUP 4        /* query heads that share one unpacking */
#define LEAST_PART 512 /* tokens worth waking a thread for */
#define LEAST_CROSSING (1 << 19) /* products of maps that are */
#define PARTS 4        /* parts a thread, so that no thread waits long for another */
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(4 * W)));
typedef int32_t ints __attribute__((vector_size(4 * W)));
typedef uint32_t words __attribute__((vector_size(4 * W)));
typedef uint16_t halves __attribute__((vector_size(2 * W)));
typedef uint8_t bytes __attribute__((vector_size(W)));

enum dtype { FP32, BF16, FP16 };
enum kind { NUMBERS, EIGHT, FOUR, TWO };

/* ---- what Python passes: 8 bytes a field, see native.py */

struct side {
  int64_t column;  /* first of the columns without codes, and their number */
  int64_t numbers;
  int64_t gain;  /* byte of the gain, -1 without one */
  int64_t byte;  /* first byte of the bands, then columns at 8, 4 and 2 bits */
  int64_t eight, four, two;
};

struct head {
  int64_t numbers, numbers_block, numbers_token; /* address of the first; bytes to the next */
  int64_t codes, codes_block, codes_token;
  struct side key, value;
};

typedef void (*parallel_fn)(void (*)(void *), void *, unsigned, unsigned);

struct call {
  const char *query; /* [B G X M] */
  char *out;         /* [B G X M], the value's columns last; both in fp32 where `wide` */
  float *lse;        /* [B G X] */
  const struct head *heads;
  const char *mask;       /* [B T] to add to scores, or null */
  const int32_t *table;   /* [B K]: the blocks of every sequence; null: block b is sequence b */
  const int32_t *ranges;  /* [B R 2]: first and last of the tokens read; null: all `tokens` */
  const float *gains;     /* what every byte of a gain means */
  parallel_fn parallel;   /* OpenMP's, or null */
  int64_t B, G, X, M, dtype, tokens, mask_stride, table_stride, block, threads, R, wide;
  double scaling;
};

/* ---- vectors */

INLINE floats splat(float x) { return x - (floats){0}; }

INLINE float sum_of(floats x) {
  float total = 0;
  for (int i = 0; i < W; i++) total += x[i];
  return total;
}

INLINE float max_of(floats x) {
  float most = x[0];
  for (int i = 1; i < W; i++) most = x[i] > most ? x[i] : most;
  return most;
}

INLINE floats choose(ints which, floats a, floats b) {
  return (floats)((which & (ints)a) | (~which & (ints)b));
}

INLINE floats larger(floats a, floats b) { return choose(a > b, a, b); }

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

/* Every step halves the numbers that are left of a vector, and puts two vectors into one. */
#if W == 16
INLINE floats join8(floats a, floats b) {
  return PICK(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         PICK(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
INLINE floats join4(floats a, floats b) {
  return PICK(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         PICK(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
INLINE floats join2(floats a, floats b) {
  return PICK(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
         PICK(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
}
INLINE floats join1(floats a, floats b) {
  return PICK(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         PICK(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
#elif W == 8
INLINE floats join4(floats a, floats b) {
  return PICK(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + PICK(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}
INLINE floats join2(floats a, floats b) {
  return PICK(a, b, 0, 1, 4, 5, 8, 9, 12, 13) + PICK(a, b, 2, 3, 6, 7, 10, 11, 14, 15);
}
INLINE floats join1(floats a, floats b) {
  return PICK(a, b, 0, 2, 4, 6, 8, 10, 12, 14) + PICK(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
}
#else
INLINE floats join2(floats a, floats b) {
  return PICK(a, b, 0, 1, 4, 5) + PICK(a, b, 2, 3, 6, 7);
}
INLINE floats join1(floats a, floats b) {
  return PICK(a, b, 0, 2, 4, 6) + PICK(a, b, 1, 3, 5, 7);
}
#endif

/* The sums of W vectors, as one. */
INLINE floats sums(const floats *x) {
  floats a[W];
  for (int i = 0; i < W; i++) a[i] = x[i];
#if W >= 16
  for (int i = 0; i < 8; i++) a[i] = join8(a[2 * i], a[2 * i + 1]);
#endif
#if W >= 8
  for (int i = 0; i < 4; i++) a[i] = join4(a[2 * i], a[2 * i + 1]);
#endif
  for (int i = 0; i < 2; i++) a[i] = join2(a[2 * i], a[2 * i + 1]);
  return join1(a[0], a[1]);
}

/* e^x of x <= 0, to one unit in the last place; zero where it is less than any normal number. */
INLINE floats exponential(floats x) {
  const float lowest = -87.0f, magic = 12582912.0f; /* 1.5 2^23: adding it rounds */
  floats y = larger(x, splat(lowest)) * 1.44269504f + magic;
  words exponent = ((words)y - (words)splat(magic) + 127u) << 23;
  floats n = y - magic;
  floats r = larger(x, splat(lowest)) - n * 0.693359375f - n * -2.12194440e-4f;
  floats p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return choose(x < lowest, splat(0), p * (floats)exponent);
}

/* ---- numbers and codes */

/* Some compilers widen vectors in many steps where the processor has one. */
#if W == 16
#define LOAD(place) _mm_loadu_si128((const __m128i *)(place))
INLINE words halves_at(const char *place) {
  return (words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)place));
}
INLINE ints bytes_at(const uint8_t *place) { return (ints)_mm512_cvtepu8_epi32(LOAD(place)); }
INLINE ints signed_at(const uint8_t *place) {
  return (ints)_mm512_cvtepi8_epi32(_mm_xor_si128(LOAD(place), _mm_set1_epi8(-128)));
}
#elif W == 8
#define LOAD(place) _mm_loadl_epi64((const __m128i *)(place))
INLINE words halves_at(const char *place) {
  return (words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)place));
}
INLINE ints bytes_at(const uint8_t *place) { return (ints)_mm256_cvtepu8_epi32(LOAD(place)); }
INLINE ints signed_at(const uint8_t *place) {
  return (ints)_mm256_cvtepi8_epi32(_mm_xor_si128(LOAD(place), _mm_set1_epi8(-128)));
}
#else
INLINE words halves_at(const char *place) {
  halves h;
  memcpy(&h, place, sizeof h);
  return __builtin_convertvector(h, words);
}
INLINE ints bytes_at(const uint8_t *place) {
  bytes b;
  memcpy(&b, place, sizeof b);
  return __builtin_convertvector(b, ints);
}
INLINE ints signed_at(const uint8_t *place) { return bytes_at(place) - 128; }
#endif

INLINE floats half_as_floats(words h) {
  words sign = (h & 0x8000u) << 16, rest = (h & 0x7fffu) << 13;
  floats x = (floats)rest * 0x1p112f; /* the exponent's two zeros lie 112 apart */
  return (floats)((words)x | sign);
}

INLINE floats numbers_at(const char *place, int dtype) {
  if (dtype == FP32) {
    floats x;
    memcpy(&x, place, sizeof x);
    return x;
  }
  words wide = halves_at(place);
  return dtype == BF16 ? (floats)(wide << 16) : half_as_floats(wide);
}

INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

INLINE float number_at(const char *place, int dtype) {
  if (dtype == FP32) {
    float x;
    memcpy(&x, place, sizeof x);
    return x;
  }
  uint16_t h;
  memcpy(&h, place, sizeof h);
  return dtype == BF16 ? float_of((uint32_t)h << 16) : half_as_floats((words){h})[0];
}

/* Rounds to nearest, ties to even. */
INLINE uint16_t as_half(float x) {
  uint32_t sign = bits_of(x) >> 16 & 0x8000u, bits = bits_of(x) & 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x477ff000u) return sign | 0x7c00u;              /* overflows */
  if (bits < 0x38800000u) {                                    /* less than 2^-14: adding 0.5 */
    return sign | (bits_of(float_of(bits) + 0.5f) - 0x3f000000u); /* rounds to units of 2^-24 */
  }
  bits += 0xfffu + (bits >> 13 & 1) - (112u << 23);
  return sign | bits >> 13;
}

INLINE void store_number(char *place, float x, int dtype) {
  if (dtype == FP32) {
    memcpy(place, &x, sizeof x);
    return;
  }
  uint32_t bits = bits_of(x);
  uint16_t h = dtype == FP16 ? as_half(x)
               : x != x      ? 0x7fc0
                             : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  memcpy(place, &h, sizeof h);
}

/* What a code's value is more than the number it is taken for, in steps. */
static const float SHORT[] = {0.0f, 0.5f, -7.5f, -1.5f};
/* Codes in a byte. */
static const int PLANES[] = {1, 1, 2, 4};

INLINE void unpack(floats *out, const uint8_t *place, int kind) {
  if (kind == EIGHT) {
    out[0] = __builtin_convertvector(signed_at(place), floats);
    return;
  }
  ints b = bytes_at(place);
  int width = kind == FOUR ? 4 : 2;
  for (int plane = 0; plane < PLANES[kind]; plane++) {
    ints code = b >> (plane * width);
    if (plane < PLANES[kind] - 1) code &= (1 << width) - 1;
    out[plane] = __builtin_convertvector(code, floats);
  }
}

/* ---- plans: a side's columns, W bytes or numbers at a time */

struct chunk {
  int kind;
  int64_t offset; /* bytes from where the token's numbers or codes begin */
  int slot;       /* first of its vectors of columns, as many as it has planes */
};

struct plan {
  int chunks, numbers, slots; /* `numbers` chunks of numbers come first */
  struct chunk *chunk;
  int32_t *column; /* of every place in the slots, -1 where there is none */
};

static int most_slots(int64_t M) { return (int)(M / W) + 12; }

/* A band of n columns in `size` bytes; plane p has the columns from p size on. */
static void plan_band(struct plan *plan, int kind, int64_t n, int64_t *column, int64_t *offset,
                      int64_t itemsize) {
  int planes = PLANES[kind];
  int64_t size = (n + planes - 1) / planes;
  for (int64_t at = 0; at < size; at += W) {
    plan->chunk[plan->chunks++] = (struct chunk){kind, *offset + at * itemsize, plan->slots};
    for (int plane = 0; plane < planes; plane++, plan->slots++) {
      for (int64_t i = 0; i < W; i++) {
        int64_t within = at + i, own = plane * size + within;
        int is_there = within < size && own < n;
        plan->column[plan->slots * W + i] = is_there ? (int32_t)(*column + own) : -1;
      }
    }
  }
  *column += n;
  *offset += size * itemsize;
}

static void make_plan(struct plan *plan, const struct side *side, int64_t itemsize) {
  int64_t column = 0, offset = side->column * itemsize;
  plan->chunks = plan->slots = 0;
  plan_band(plan, NUMBERS, side->numbers, &column, &offset, itemsize);
  plan->numbers = plan->chunks;
  offset = side->byte;
  plan_band(plan, EIGHT, side->eight, &column, &offset, 1);
  plan_band(plan, FOUR, side->four, &column, &offset, 1);
  plan_band(plan, TWO, side->two, &column, &offset, 1);
}

static int64_t rank_of(const struct side *side) {
  return side->numbers + side->eight + side->four + side->two;
}

static int64_t end_of_codes(const struct side *side) {
  return side->byte + side->eight + (side->four + 1) / 2 + (side->two + 3) / 4;
}

/* ---- a thread's room */

struct room {
  struct plan key, value; /* of head `planned` */
  int64_t planned;
  floats *query;   /* [X slot] of a group of query heads */
  floats *sum;     /* [X TILE]: products of one token's columns, to be added up */
  floats *out;     /* [X slot] */
  float *score;    /* [X TILE] */
  float *weight;   /* [TILE X], of numbers */
  float *weighted; /* [TILE X], of codes: times their gain */
  float bias[TILE], key_gain[TILE], value_gain[TILE];
  const char *numbers[TILE];
  const uint8_t *codes[TILE];
  char *spare_numbers;   /* copies of rows at whose end memory may end */
  uint8_t *spare_codes;
  void *memory;
};

static size_t up(size_t size) { return (size + 63) / 64 * 64; }

static int make_room(struct room *room, int64_t M, int64_t codes, int64_t numbers) {
  size_t slots = most_slots(M), size[12], total = 64;
  size[0] = size[1] = up(slots * sizeof(struct chunk));
  size[2] = size[3] = up(slots * W * sizeof(int32_t));
  size[4] = size[5] = up(GROUP * slots * sizeof(floats));
  size[6] = up(GROUP * TILE * sizeof(floats));
  size[7] = size[8] = size[9] = up(GROUP * TILE * sizeof(float));
  size[10] = up(TILE * (numbers + 4 * W));
  size[11] = up(TILE * (codes + W));
  for (int i = 0; i < 12; i++) total += size[i];
  room->memory = malloc(total);
  if (!room->memory) return 0;
  room->planned = -1;
  char *at = (char *)(((uintptr_t)room->memory + 63) / 64 * 64);
  void *part[12];
  for (int i = 0; i < 12; i++) part[i] = at, at += size[i];
  room->key.chunk = part[0], room->value.chunk = part[1];
  room->key.column = part[2], room->value.column = part[3];
  room->query = part[4], room->out = part[5], room->sum = part[6];
  room->score = part[7], room->weight = part[8], room->weighted = part[9];
  room->spare_numbers = part[10], room->spare_codes = part[11];
  return 1;
}

/* ---- a tile of tokens */

struct item {
  int64_t b, g, first, last; /* tokens `first` to `last` of one head */
  int64_t end;               /* where its range ends, behind which may be anything */
  float *part;               /* [X M], weighted sums over them by their own largest score */
  float *most, *total;       /* [X]: that score, and the weights' sum */
};

struct job {
  const struct call *call;
  struct item *items;
  int64_t count, next, codes, numbers; /* the longest row of any head, in bytes */
  int failed;
};

/* Where the rows of tokens are. Vectors read on behind a row: into the next one, or where there may
 * be none into a copy. */
static void find_rows(struct room *room, const struct call *call, const struct head *head,
                      const struct item *item, int64_t first, int count) {
  int64_t itemsize = call->dtype == FP32 ? 4 : 2;
  int64_t row_codes = end_of_codes(&head->value);
  int64_t row_numbers = (head->key.numbers + head->value.numbers) * itemsize;
  int has_codes = head->key.gain >= 0 || head->value.gain >= 0;
  int64_t which = first / call->block, place = first % call->block;
  const char *numbers_of_block = NULL, *codes_of_block = NULL;
  for (int t = 0; t < count; t++, place++) {
    if (place == call->block) place = 0, which++;
    if (place == 0 || t == 0) {
      int64_t block = call->table ? call->table[item->b * call->table_stride + which] : item->b;
      numbers_of_block = (const char *)head->numbers + block * head->numbers_block;
      codes_of_block = (const char *)head->codes + block * head->codes_block;
    }
    int64_t left = item->end - first - t;
    left = call->block - place < left ? call->block - place : left;
    const char *numbers = numbers_of_block + place * head->numbers_token;
    const char *codes = codes_of_block + place * head->codes_token;
    if (row_numbers && (left - 1) * head->numbers_token < 4 * W) {
      char *copy = room->spare_numbers + t * (row_numbers + 4 * W);
      numbers = memcpy(copy, numbers, row_numbers);
    }
    if (has_codes && (left - 1) * head->codes_token < W) {
      uint8_t *copy = room->spare_codes + t * (row_codes + W);
      codes = memcpy(copy, codes, row_codes);
    }
    room->numbers[t] = numbers;
    room->codes[t] = (const uint8_t *)codes;
    room->key_gain[t] = head->key.gain < 0 ? 0 : call->gains[room->codes[t][head->key.gain]];
    room->value_gain[t] = head->value.gain < 0 ? 0 : call->gains[room->codes[t][head->value.gain]];
  }
}

/* Products of the query and one chunk, added to every token's sum. */
INLINE void multiply(struct room *room, const struct chunk *chunk, int count, int slots, int kind,
                     int dtype, int X) {
  const floats *query = room->query + chunk->slot;
  floats *sum = room->sum, q[GROUP * 4];
  for (int x = 0; x < X; x++)
    for (int plane = 0; plane < PLANES[kind]; plane++)
      q[x * 4 + plane] = query[x * slots + plane];
  ints lanes = {0};
  if (kind == NUMBERS) {
    const int32_t *column = room->key.column + chunk->slot * W;
    for (int i = 0; i < W; i++) lanes[i] = column[i] < 0 ? 0 : -1;
  }
  for (int t = 0; t < count; t++) {
    floats code[4];
    if (kind == NUMBERS) {
      /* What lies behind the row may be anything, and zero times that no number. */
      code[0] = (floats)((ints)numbers_at(room->numbers[t] + chunk->offset, dtype) & lanes);
    } else {
      unpack(code, room->codes[t] + chunk->offset, kind);
    }
    for (int x = 0; x < X; x++)
      for (int plane = 0; plane < PLANES[kind]; plane++)
        sum[x * TILE + t] += code[plane] * q[x * 4 + plane];
  }
}

/* One chunk times the weights, added to the weighted sums. */
INLINE void gather(struct room *room, const struct chunk *chunk, int count, int slots, int kind,
                   int dtype, int X) {
  floats *out = room->out + chunk->slot, a[2][GROUP * 4];
  const float *weight = kind == NUMBERS ? room->weight : room->weighted;
  for (int x = 0; x < X; x++)
    for (int plane = 0; plane < PLANES[kind]; plane++) {
      a[0][x * 4 + plane] = out[x * slots + plane];
      a[1][x * 4 + plane] = splat(0);
    }
  /* Two tokens at a time, whose sums need not wait for each other; `count` is even. */
  for (int t = 0; t < count; t += 2)
    for (int two = 0; two < 2; two++) {
      floats code[4];
      if (kind == NUMBERS)
        code[0] = numbers_at(room->numbers[t + two] + chunk->offset, dtype);
      else
        unpack(code, room->codes[t + two] + chunk->offset, kind);
      for (int x = 0; x < X; x++)
        for (int plane = 0; plane < PLANES[kind]; plane++)
          a[two][x * 4 + plane] += code[plane] * weight[(t + two) * X + x];
    }
  for (int x = 0; x < X; x++)
    for (int plane = 0; plane < PLANES[kind]; plane++)
      out[x * slots + plane] = a[0][x * 4 + plane] + a[1][x * 4 + plane];
}

/* One of the two over a stretch of chunks, each kind a loop of its own. */
#define OVER(function, plan, from, to)                                                     \
  for (int c = from; c < to; c++) {                                                        \
    const struct chunk *chunk = &(plan)->chunk[c];                                         \
    int slots = (plan)->slots;                                                             \
    if (chunk->kind == EIGHT)                                                              \
      function(room, chunk, count, slots, EIGHT, FP32, X);                                 \
    else if (chunk->kind == FOUR)                                                          \
      function(room, chunk, count, slots, FOUR, FP32, X);                                  \
    else if (chunk->kind == TWO)                                                           \
      function(room, chunk, count, slots, TWO, FP32, X);                                   \
    else if (dtype == FP32)                                                                \
      function(room, chunk, count, slots, NUMBERS, FP32, X);                               \
    else if (dtype == BF16)                                                                \
      function(room, chunk, count, slots, NUMBERS, BF16, X);                               \
    else                                                                                   \
      function(room, chunk, count, slots, NUMBERS, FP16, X);                               \
  }

/* Scores of `count` tokens, a multiple of W, but for scaling and mask. */
INLINE void score_tile(struct room *room, int count, int dtype, const float *offset, int X) {
  struct plan *plan = &room->key;
  memset(room->sum, 0, X * TILE * sizeof(floats));
  OVER(multiply, plan, 0, plan->numbers)
  for (int x = 0; x < X; x++)
    for (int t = 0; t < count; t += W) {
      floats score = plan->numbers ? sums(room->sum + x * TILE + t) : splat(0);
      memcpy(room->score + x * TILE + t, &score, sizeof score);
    }
  if (plan->chunks == plan->numbers) return;
  if (plan->numbers) memset(room->sum, 0, X * TILE * sizeof(floats));
  OVER(multiply, plan, plan->numbers, plan->chunks)
  for (int x = 0; x < X; x++)
    for (int t = 0; t < count; t += W) {
      floats score, gain, code = sums(room->sum + x * TILE + t);
      memcpy(&score, room->score + x * TILE + t, sizeof score);
      memcpy(&gain, room->key_gain + t, sizeof gain);
      score += gain * (code + offset[x]);
      memcpy(room->score + x * TILE + t, &score, sizeof score);
    }
}

/* Scores become weights by the largest so far, which may rise; returns what the sums before are
 * worth now. */
INLINE float weigh(struct room *room, int count, int x, int X, float scaling, float *most,
                   float *total, float *gained) {
  floats high = splat(-INFINITY), sum = splat(0), sum_gained = splat(0);
  for (int t = 0; t < count; t += W) {
    floats score, bias;
    memcpy(&score, room->score + x * TILE + t, sizeof score);
    memcpy(&bias, room->bias + t, sizeof bias);
    score = score * scaling + bias;
    high = larger(high, score);
    memcpy(room->score + x * TILE + t, &score, sizeof score);
  }
  float now = max_of(high);
  now = now > *most ? now : *most;
  float fade = *most == now ? 1.0f : expf(*most - now);
  for (int t = 0; t < count; t += W) {
    floats score, gain;
    memcpy(&score, room->score + x * TILE + t, sizeof score);
    memcpy(&gain, room->value_gain + t, sizeof gain);
    floats weight = exponential(score - now), weighted = weight * gain;
    sum += weight;
    sum_gained += weighted;
    for (int i = 0; i < W; i++) {
      room->weight[(t + i) * X + x] = weight[i];
      room->weighted[(t + i) * X + x] = weighted[i];
    }
  }
  *most = now;
  *total = *total * fade + sum_of(sum);
  *gained = *gained * fade + sum_of(sum_gained);
  return fade;
}

/* ---- an item */

/* The query's numbers in the places of the key's columns, zero elsewhere; returns its product with
 * what codes are short of their values. */
static float place_query(struct room *room, const struct call *call, const struct item *item,
                         int64_t x, int place) {
  struct plan *plan = &room->key;
  int dtype = call->wide ? FP32 : (int)call->dtype;
  int64_t itemsize = dtype == FP32 ? 4 : 2;
  const char *query = call->query + ((item->b * call->G + item->g) * call->X + x) * call->M * itemsize;
  float *out = (float *)(room->query + place * plan->slots);
  double offset = 0;
  for (int c = 0; c < plan->chunks; c++) {
    const struct chunk *chunk = &plan->chunk[c];
    for (int i = chunk->slot * W; i < (chunk->slot + PLANES[chunk->kind]) * W; i++) {
      int32_t column = plan->column[i];
      out[i] = column < 0 ? 0 : number_at(query + column * itemsize, dtype);
      offset += out[i] * SHORT[chunk->kind];
    }
  }
  return (float)offset;
}

static void keep(struct room *room, const struct call *call, const struct item *item, int64_t x,
                 int place, float gained) {
  struct plan *plan = &room->value;
  const float *out = (const float *)(room->out + place * plan->slots);
  for (int c = 0; c < plan->chunks; c++) {
    const struct chunk *chunk = &plan->chunk[c];
    for (int i = chunk->slot * W; i < (chunk->slot + PLANES[chunk->kind]) * W; i++)
      if (plan->column[i] >= 0)
        item->part[x * call->M + plan->column[i]] = out[i] + gained * SHORT[chunk->kind];
  }
}

INLINE void attend(struct room *room, const struct call *call, const struct item *item, int64_t x0,
                   int X) {
  const struct head *head = &call->heads[item->g];
  int dtype = (int)call->dtype;
  int64_t itemsize = dtype == FP32 ? 4 : 2;
  const char *mask = call->mask ? call->mask + item->b * call->mask_stride * itemsize : NULL;
  float offset[GROUP], most[GROUP], total[GROUP] = {0}, gained[GROUP] = {0};
  for (int x = 0; x < X; x++) {
    offset[x] = place_query(room, call, item, x0 + x, x);
    most[x] = -FLT_MAX;
  }
  memset(room->out, 0, X * room->value.slots * sizeof(floats));
  for (int64_t first = item->first; first < item->last; first += TILE) {
    int real = (int)(item->last - first < TILE ? item->last - first : TILE);
    int count = (real + W - 1) / W * W;
    find_rows(room, call, head, item, first, real);
    for (int t = 0; t < real; t++)
      room->bias[t] = mask ? number_at(mask + (first + t) * itemsize, dtype) : 0;
    for (int t = real; t < count; t++) { /* tokens that weigh nothing */
      room->numbers[t] = room->numbers[real - 1], room->codes[t] = room->codes[real - 1];
      room->key_gain[t] = room->value_gain[t] = 0;
      room->bias[t] = -INFINITY;
    }
    score_tile(room, count, dtype, offset, X);
    for (int x = 0; x < X; x++) {
      float fade =
          weigh(room, count, x, X, (float)call->scaling, &most[x], &total[x], &gained[x]);
      if (fade != 1)
        for (int i = 0; i < room->value.slots; i++) room->out[x * room->value.slots + i] *= fade;
    }
    OVER(gather, &room->value, 0, room->value.chunks)
  }
  for (int x = 0; x < X; x++) {
    keep(room, call, item, x0 + x, x, gained[x]);
    item->most[x0 + x] = most[x], item->total[x0 + x] = total[x];
  }
}

static void attend_item(struct room *room, const struct call *call, const struct item *item) {
  int64_t itemsize = call->dtype == FP32 ? 4 : 2;
  if (room->planned != item->g) {
    make_plan(&room->key, &call->heads[item->g].key, itemsize);
    make_plan(&room->value, &call->heads[item->g].value, itemsize);
    room->planned = item->g;
  }
  for (int64_t x = 0; x < call->X;) {
    int64_t left = call->X - x;
    if (left >= 4)
      attend(room, call, item, x, 4), x += 4;
    else if (left == 3)
      attend(room, call, item, x, 3), x += 3;
    else if (left == 2)
      attend(room, call, item, x, 2), x += 2;
    else
      attend(room, call, item, x, 1), x += 1;
  }
}

/* What every thread does: the next item, until there is none. */
static void work(void *data) {
  struct job *job = data;
  struct room room;
  if (!make_room(&room, job->call->M, job->codes, job->numbers)) {
    __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
    return;
  }
  int64_t next;
  while ((next = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->count)
    attend_item(&room, job->call, &job->items[next]);
  free(room.memory);
}

/* ---- the call */

/* Puts the parts of one head together, `count` items in a row, whose largest scores become their
 * shares. */
static void merge(const struct call *call, const struct item *items, int64_t count, int64_t b,
                  int64_t g) {
  int dtype = call->wide ? FP32 : (int)call->dtype;
  int64_t M = call->M, itemsize = dtype == FP32 ? 4 : 2;
  int64_t rank = rank_of(&call->heads[g].value);
  for (int64_t x = 0; x < call->X; x++) {
    int64_t place = (b * call->G + g) * call->X + x;
    char *out = call->out + place * M * itemsize;
    float most = -FLT_MAX, total = 0;
    for (int64_t i = 0; i < count; i++) most = items[i].most[x] > most ? items[i].most[x] : most;
    for (int64_t i = 0; i < count; i++) {
      items[i].most[x] = expf(items[i].most[x] - most);
      total += items[i].total[x] * items[i].most[x];
    }
    memset(out, 0, (M - rank) * itemsize);
    for (int64_t m = 0; m < rank; m++) {
      float sum = 0;
      for (int64_t i = 0; i < count; i++) sum += items[i].part[x * M + m] * items[i].most[x];
      store_number(out + (M - rank + m) * itemsize, count ? sum / total : 0, dtype);
    }
    call->lse[place] = count ? most + logf(total) : -INFINITY;
  }
}

/* The r-th stretch of tokens that sequence b reads. */
struct range {
  int64_t first, last;
};

static struct range range_of(const struct call *call, int64_t b, int64_t r) {
  if (!call->ranges) return (struct range){0, call->tokens};
  const int32_t *own = call->ranges + (b * call->R + r) * 2;
  return (struct range){own[0], own[1] > own[0] ? own[1] : own[0]};
}

/* Items of so many tokens for what one head of a sequence reads. */
static int64_t items_of(const struct call *call, int64_t b, int64_t part) {
  int64_t count = 0;
  for (int64_t r = 0; r < call->R; r++) {
    struct range range = range_of(call, b, r);
    count += (range.last - range.first + part - 1) / part;
  }
  return count;
}

/* Tokens of one item. */
static int64_t part_of(const struct call *call) {
  int64_t all = 0;
  for (int64_t b = 0; b < call->B; b++) all += items_of(call, b, 1) * call->G;
  if (call->threads < 2) return all > 0 ? all : 1;
  int64_t part = all / (call->threads * PARTS);
  if (part < LEAST_PART) part = LEAST_PART;
  return (part + TILE - 1) / TILE * TILE;
}

/* Attention of one query position of all sequences over their tokens; 0, or 1 without memory. */
int matkv_decode(const struct call *call) {
  int64_t part = part_of(call), count = 0, X = call->X;
  for (int64_t b = 0; b < call->B; b++) count += call->G * items_of(call, b, part);
  struct job job = {.call = call, .count = count};
  for (int64_t g = 0; g < call->G; g++) {
    const struct head *head = &call->heads[g];
    int64_t codes = end_of_codes(&head->value);
    int64_t numbers = (head->key.numbers + head->value.numbers) * 4;
    job.codes = codes > job.codes ? codes : job.codes;
    job.numbers = numbers > job.numbers ? numbers : job.numbers;
  }
  job.items = malloc((count + 1) * sizeof(struct item));
  float *parts = malloc((count + 1) * X * (call->M + 2) * sizeof(float));
  if (!job.items || !parts) {
    free(job.items), free(parts);
    return 1;
  }
  int64_t next = 0;
  for (int64_t g = 0; g < call->G; g++) /* heads first: a head's plan serves all sequences */
    for (int64_t b = 0; b < call->B; b++)
      for (int64_t r = 0; r < call->R; r++) {
        struct range range = range_of(call, b, r);
        for (int64_t first = range.first; first < range.last; first += part, next++) {
          int64_t last = first + part < range.last ? first + part : range.last;
          float *own = parts + next * X * (call->M + 2);
          float *most = own + X * call->M;
          job.items[next] = (struct item){b, g, first, last, range.last, own, most, most + X};
        }
      }
  int64_t threads = call->threads < count ? call->threads : count;
  if (threads > 1 && call->parallel)
    call->parallel(work, &job, (unsigned)threads, 0);
  else
    work(&job);
  next = 0;
  for (int64_t g = 0; g < call->G && !job.failed; g++)
    for (int64_t b = 0; b < call->B; b++) {
      int64_t own = items_of(call, b, part);
      merge(call, job.items + next, own, b, g);
      next += own;
    }
  free(job.items), free(parts);
  return job.failed;
}

/* ---- a step of a server */

/* y = x map, of so many rows and columns, `count` vectors of columns from `first` on at a time. */
INLINE void times_block(float *y, const float *x, const char *map, int64_t rows, int64_t columns,
                        int64_t first, int count, int dtype) {
  int64_t size = dtype == FP32 ? 4 : 2;
  floats sum[4] = {0};
  for (int64_t i = 0; i < rows; i++)
    for (int k = 0; k < count; k++)
      sum[k] += numbers_at(map + (i * columns + first + k * W) * size, dtype) * x[i];
  memcpy(y + first, sum, count * sizeof(floats));
}

INLINE void times_as(float *y, const float *x, const char *map, int64_t rows, int64_t columns,
                     int dtype) {
  int64_t size = dtype == FP32 ? 4 : 2, j = 0;
  for (; j + 4 * W <= columns; j += 4 * W) times_block(y, x, map, rows, columns, j, 4, dtype);
  for (; j + W <= columns; j += W) times_block(y, x, map, rows, columns, j, 1, dtype);
  for (; j < columns; j++) {
    y[j] = 0;
    for (int64_t i = 0; i < rows; i++)
      y[j] += x[i] * number_at(map + (i * columns + j) * size, dtype);
  }
}

static void times(float *y, const float *x, const char *map, int64_t rows, int64_t columns,
                  int dtype) {
  if (dtype == FP32)
    times_as(y, x, map, rows, columns, FP32);
  else if (dtype == BF16)
    times_as(y, x, map, rows, columns, BF16);
  else
    times_as(y, x, map, rows, columns, FP16);
}

struct step {
  const char *query;   /* [T H D], heads and columns dense, tokens `query_t` numbers apart */
  char *out;           /* the same */
  const int64_t *tokens; /* [B]: which token is a sequence's; null: token b is sequence b's */
  const char *query_map, *output_map; /* [G D M] and [G M D] */
  const int64_t *order;               /* [G]: a head's place in the model's order */
  struct call far, near; /* on latents; and on whole keys and values, heads in the model's order, or
                          * without heads where there is no such part */
  int64_t D, dtype, map_dtype, query_t, out_t;
};

struct crossing {
  struct step *step;
  int64_t next;
  int back, failed;
};

/* One head's queries, into the basis and as they are; or its outputs, out of it and put together. */
static void cross_head(const struct step *step, int64_t b, int64_t g, int back, float *room) {
  const struct call *far = &step->far, *near = &step->near;
  int64_t D = step->D, M = far->M, X = far->X, head = step->order[g] * X;
  int64_t t = step->tokens ? step->tokens[b] : b, size = step->dtype == FP32 ? 4 : 2;
  int64_t map = g * D * M * (step->map_dtype == FP32 ? 4 : 2);
  for (int64_t x = 0; x < X; x++) {
    int64_t place = (b * far->G + g) * X + x, own = b * far->G * X + head + x;
    float *whole = room;
    if (!back) {
      const char *query = step->query + (t * step->query_t + (head + x) * D) * size;
      if (near->heads) whole = (float *)near->query + own * D;
      for (int64_t j = 0; j < D; j++) whole[j] = number_at(query + j * size, (int)step->dtype);
      times((float *)far->query + place * M, whole, step->query_map + map, D, M,
            (int)step->map_dtype);
      continue;
    }
    times(whole, (float *)far->out + place * M, step->output_map + map, M, D,
          (int)step->map_dtype);
    char *out = step->out + (t * step->out_t + (head + x) * D) * size;
    const float *other = (const float *)near->out + own * D;
    float share = near->heads ? 1 / (1 + expf(near->lse[own] - far->lse[place])) : 1;
    for (int64_t j = 0; j < D; j++) {
      float number = near->heads ? other[j] + share * (whole[j] - other[j]) : whole[j];
      store_number(out + j * size, number, (int)step->dtype);
    }
  }
}

static void cross(void *data) {
  struct crossing *crossing = data;
  const struct step *step = crossing->step;
  float *room = malloc(step->D * sizeof(float));
  if (!room) {
    __atomic_store_n(&crossing->failed, 1, __ATOMIC_RELAXED);
    return;
  }
  int64_t next, count = step->far.B * step->far.G;
  while ((next = __atomic_fetch_add(&crossing->next, 1, __ATOMIC_RELAXED)) < count)
    cross_head(step, next % step->far.B, next / step->far.B, crossing->back, room);
  free(room);
}

/* All heads, on as many threads as there is work for. */
static int cross_all(struct step *step, int back) {
  struct crossing crossing = {.step = step, .back = back};
  int64_t heads = step->far.B * step->far.G * step->far.X, threads = step->far.threads;
  int64_t useful = heads * step->D * step->far.M / LEAST_CROSSING;
  threads = threads < useful ? threads : useful;
  if (threads > 1 && step->far.parallel)
    step->far.parallel(cross, &crossing, (unsigned)threads, 0);
  else
    cross(&crossing);
  return crossing.failed;
}

/* Attention of one new token of every sequence, from its query to its output; 0, or 1 without
 * memory. */
int matkv_step(struct step *step) {
  struct call *far = &step->far, *near = &step->near;
  int64_t heads = far->B * far->G * far->X, width = 2 * (far->M + step->D + 1);
  float *memory = malloc((heads * width + 1) * sizeof(float)), *at = memory;
  if (!memory) return 1;
  struct call *both[] = {far, near};
  for (int i = 0; i < 2; i++) {
    int64_t columns = i ? step->D : far->M;
    both[i]->query = (char *)at, at += heads * columns;
    both[i]->out = (char *)at, at += heads * columns;
    both[i]->lse = at, at += heads;
    both[i]->wide = 1;
  }
  int failed = cross_all(step, 0) || matkv_decode(far) || (near->heads && matkv_decode(near)) ||
               cross_all(step, 1);
  free(memory);
  return failed;
}

/* ---- rows of new tokens */

struct encoding {
  const char *states;    /* [B G T F], heads in the model's order, F = 2 D, dense */
  const char *maps;      /* [G 2 D D] to columns of unit variance, of both sides */
  const char *steps;     /* [G F] */
  const int64_t *order;  /* [G]: a head's place among the states */
  const struct head *heads; /* where its rows go: `block` is here the sequence */
  int64_t B, G, T, D, dtype, map_dtype, state_b, state_g, state_t; /* strides in numbers */
  int64_t gain_zero, gain_steps;
  const int64_t *slots; /* [T]: where in the pages every token goes; null: block b, place t */
  int64_t page;         /* tokens of one */
};

/* Codes of one band, packed: plane p has the columns from p size on. */
static void pack(uint8_t *out, const float *y, const float *step, float gain, int64_t n, int width) {
  int64_t planes = 8 / width, size = (n + planes - 1) / planes;
  float half = (float)(1 << (width - 1));
  memset(out, 0, size);
  for (int64_t j = 0; j < n; j++) {
    float code = floorf(y[j] / gain / step[j]);
    code = code < -half ? -half : code > half - 1 ? half - 1 : code;
    out[j % size] |= (uint8_t)((int)(code + half) << (j / size * width));
  }
}

static void encode_side(const struct encoding *call, const struct side *side, const float *y,
                        const float *step, char *numbers, uint8_t *codes) {
  int64_t itemsize = call->dtype == FP32 ? 4 : 2;
  for (int64_t j = 0; j < side->numbers; j++)
    store_number(numbers + (side->column + j) * itemsize, y[j], (int)call->dtype);
  if (side->gain < 0) return;
  float size = 1e-12f;
  for (int64_t j = 0; j < call->D; j++) size = fabsf(y[j]) > size ? fabsf(y[j]) : size;
  float zero = (float)call->gain_zero, steps = (float)call->gain_steps;
  float code = rintf(log2f(size) * steps) + zero;
  code = code < 0 ? 0 : code > 255 ? 255 : code;
  codes[side->gain] = (uint8_t)code;
  float gain = exp2f((code - zero) / steps);
  const int64_t counts[] = {side->eight, side->four, side->two};
  int64_t byte = side->byte, column = side->numbers;
  for (int band = 0; band < 3; band++) {
    int width = 8 >> band;
    pack(codes + byte, y + column, step + column, gain, counts[band], width);
    byte += (counts[band] * width + 7) / 8, column += counts[band];
  }
}


/* Rows of new tokens, numbers and codes, into their places; 0, or 1 without memory. */
int matkv_encode(const struct encoding *call) {
  int64_t D = call->D, F = 2 * D, itemsize = call->dtype == FP32 ? 4 : 2;
  int64_t map_size = call->map_dtype == FP32 ? 4 : 2;
  float *x = malloc((3 * F) * sizeof(float)), *y = x + F, *step = x + 2 * F;
  if (!x) return 1;
  for (int64_t g = 0; g < call->G; g++) {
    const struct head *head = &call->heads[g];
    for (int64_t j = 0; j < F; j++)
      step[j] = number_at(call->steps + (g * F + j) * map_size, (int)call->map_dtype);
    for (int64_t b = 0; b < call->B; b++)
      for (int64_t t = 0; t < call->T; t++) {
        int64_t place = b * call->state_b + call->order[g] * call->state_g + t * call->state_t;
        for (int64_t j = 0; j < F; j++)
          x[j] = number_at(call->states + (place + j) * itemsize, (int)call->dtype);
        for (int side = 0; side < 2; side++)
          times(y + side * D, x + side * D, call->maps + (g * 2 + side) * D * D * map_size, D, D,
                (int)call->map_dtype);
        int64_t block = call->slots ? call->slots[t] / call->page : b;
        int64_t own = call->slots ? call->slots[t] % call->page : t;
        char *numbers =
            (char *)head->numbers + block * head->numbers_block + own * head->numbers_token;
        uint8_t *codes =
            (uint8_t *)head->codes + block * head->codes_block + own * head->codes_token;
        encode_side(call, &head->key, y, step, numbers, codes);
        encode_side(call, &head->value, y + D, step + D, numbers, codes);
      }
  }
  free(x);
  return 0;
}
