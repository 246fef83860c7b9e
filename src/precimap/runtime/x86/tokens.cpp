// INT8 products whose inputs are quantised on the way: x [m, k] in float32 or BF16, one symmetric scale for each row,
// times codes [n, k] with a scale for each of n, in the tiles of AMX or the byte products of AVX-512 VNNI.
//
//     scale = max |x| / 127    code = round(x / scale), ties to even    y = sum of codes * scale * the weight's + bias
//
// Invariant: codes and scales have the bits of numerics/quantize.py, sums of codes are exact in 32 bits, and each step
// of y is one rounded float32 operation, from left to right. So neither instructions nor threads nor other rows change
// a bit of it. No -ffast-math, no contraction to fused multiply-adds.
//
// A block of rows is quantised into tiles (16 rows x 64 codes) that stay in L2. 32 rows of it, in L1, meet the weight
// panel by panel (32 outputs), as many as fit into L2, so that results are written along their rows. While the tiles of
// one 32 x 32 block multiply, the sums of the block before go out and inputs of the next rows come in.
//
// Packed weight: panel after panel; in it, for each 64 inputs, two tiles of 16 outputs as [k / 4][output][4], then the
// sums of codes of the 32 outputs: VNNI multiplies unsigned by signed bytes, so its inputs have 128 added.
//
// Not taken (docs/log.md): oneDNN's ukernel through at::native::cpublas::brgemm, 1.15 to 1.4 times as long;
// quantising the next rows between the products of these; sums over parts of k.
#include <vector>

#include "tokens_rows.h"

namespace {

constexpr i64 PANEL = 32, PAIR = 32;  // outputs, rows
constexpr i64 SUMS = PANEL * sizeof(int32_t);
// Of a block of rows, and of the panels that it meets at a time: both are to stay in L2 beside the results.
constexpr i64 MOST_ROWS = 256, MOST_CODES = 768 << 10, GROUP_CODES = 512 << 10;

// bias: null for none. stride: of the rows of x, in values. half: BF16, not float32. tiles: AMX, not VNNI.
struct Problem {
    const void *x, *packed, *scales, *bias;
    void* out;
    i64 m, n, k, stride;
    int x_half, bias_half, out_half;
    float phase;
    int tiles, threads;

    i64 steps() const { return (k + STEP - 1) / STEP; }
};

inline __m512 floats(const void* from, bool half, i64 at, __mmask16 mask) {
    if (!half) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(from) + at);
    const __m256i bits = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(from) + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// BF16 in the upper half of each value, to nearest, ties to even. AVX512-BF16 takes subnormals for zeros.
inline __m512i rounded(__m512 y) {
    const __m512i bits = _mm512_castps_si512(y);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    return _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}

inline void write(float* to, __m512 a, __m512 b, __mmask32 mask) {
    _mm512_mask_storeu_ps(to, __mmask16(mask), a);
    _mm512_mask_storeu_ps(to + 16, __mmask16(mask >> 16), b);
}

inline void write(uint16_t* to, __m512 a, __m512 b, __mmask32 mask) {
    alignas(64) static const uint16_t upper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                   33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const __m512i both = _mm512_permutex2var_epi16(rounded(a), _mm512_load_si512(upper), rounded(b));
    _mm512_mask_storeu_epi16(to, mask, both);
}

// What a panel does to sums: a scale and a bias for each of its outputs.
struct Panel {
    __m512 scale0, scale1, bias0, bias1;
    __mmask32 mask;
    bool biased;
    Panel() = default;
    Panel(const Problem& p, i64 first) {
        const i64 count = std::min(PANEL, p.n - first);
        mask = count == PANEL ? ~0u : (1u << count) - 1;
        scale0 = floats(p.scales, false, first, __mmask16(mask));
        scale1 = floats(p.scales, false, first + 16, __mmask16(mask >> 16));
        biased = p.bias != nullptr;
        bias0 = biased ? floats(p.bias, p.bias_half, first, __mmask16(mask)) : _mm512_setzero_ps();
        bias1 = biased ? floats(p.bias, p.bias_half, first + 16, __mmask16(mask >> 16)) : _mm512_setzero_ps();
    }
};

// A block of sums on its way out, in as many pieces as there is time for.
template <class O>
struct Leaving {
    Panel panel;
    const int32_t* sums = nullptr;
    const float* scales = nullptr;
    O *out = nullptr, *next = nullptr;  // next: where the block after it goes, whose lines are asked for meanwhile
    i64 width = 0;
    int rows = 0, done = 0, next_rows = 0;

    void up_to(int row) {
        for (row = std::min(row, rows); done < row; done++) {
            if (done < next_rows) _m_prefetchw(next + done * width);
            if (done < next_rows && sizeof(O) == 4) _m_prefetchw(next + done * width + 16);
            const __m512 scale = _mm512_set1_ps(scales[done]);
            __m512 a = _mm512_cvtepi32_ps(_mm512_load_si512(sums + done * PANEL));
            __m512 b = _mm512_cvtepi32_ps(_mm512_load_si512(sums + done * PANEL + 16));
            a = _mm512_mul_ps(_mm512_mul_ps(a, scale), panel.scale0);
            b = _mm512_mul_ps(_mm512_mul_ps(b, scale), panel.scale1);
            if (panel.biased) {
                a = _mm512_add_ps(a, panel.bias0);
                b = _mm512_add_ps(b, panel.bias1);
            }
            write(out + done * width, a, b, panel.mask);
        }
    }
};

// Inputs of the next rows, asked for while these are multiplied, `some` bytes at a time.
struct Ahead {
    const char* at;
    i64 bytes, some;

    void ask() {
        const i64 left = std::max<i64>(0, bytes - some);
        for (; bytes > left; bytes -= 64, at += 64) _mm_prefetch(at, _MM_HINT_T1);
    }
};

struct alignas(64) TileConfig {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

const TileConfig FULL = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

template <class O>
inline void by_tiles(const int8_t* a, bool second, const int8_t* b, i64 steps, int32_t* sums, Leaving<O>& before,
                     Ahead& ahead) {
    const int8_t* a2 = a + (second ? steps * TILE : 0);  // a second tile of rows, or the first again
    const int each = int((PAIR + steps - 1) / steps);
    asm volatile("" ::: "memory");  // codes are written by now: GCC does not know that loading a tile reads memory
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (i64 s = 0; s < steps; s++) {
        _tile_loadd(6, b + 2 * s * TILE, 64); _tile_loadd(4, a + s * TILE, 64);
        _tile_loadd(7, b + (2 * s + 1) * TILE, 64); _tile_loadd(5, a2 + s * TILE, 64);
        _tile_dpbssd(0, 4, 6); _tile_dpbssd(1, 4, 7); _tile_dpbssd(2, 5, 6); _tile_dpbssd(3, 5, 7);
        before.up_to(int(s + 1) * each);
        ahead.ask();
    }
    _tile_stored(0, sums, 128); _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + 16 * PANEL, 128); _tile_stored(3, sums + 16 * PANEL + 16, 128);
}

// sum += unsigned bytes a times signed bytes b. Written down, for GCC 12 copies each sum before its intrinsic.
inline void add_products(__m512i& sum, __m512i a, __m512i b) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

void by_vectors(const int8_t* a, int rows, const int8_t* b, i64 steps, int32_t* sums) {
    const int8_t* of_codes = b + 2 * steps * TILE;
    const __m512i added0 = _mm512_slli_epi32(_mm512_loadu_si512(of_codes), 7);
    const __m512i added1 = _mm512_slli_epi32(_mm512_loadu_si512(of_codes + 64), 7);
    for (int first = 0; first < rows; first += 8) {
        const int8_t* from = a + (first / 16) * steps * TILE + (first % 16) * STEP;
        __m512i sum[8][2];
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
        for (i64 s = 0; s < steps; s++)
            for (int q = 0; q < 16; q++) {
                const __m512i b0 = _mm512_loadu_si512(b + 2 * s * TILE + q * 64);
                const __m512i b1 = _mm512_loadu_si512(b + (2 * s + 1) * TILE + q * 64);
#pragma GCC unroll 8
                for (int r = 0; r < 8; r++) {
                    int32_t four;
                    memcpy(&four, from + s * TILE + r * STEP + q * 4, sizeof four);
                    const __m512i codes = _mm512_set1_epi32(four);
                    add_products(sum[r][0], codes, b0);
                    add_products(sum[r][1], codes, b1);
                }
            }
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) {
            _mm512_store_si512(sums + (first + r) * PANEL, _mm512_sub_epi32(sum[r][0], added0));
            _mm512_store_si512(sums + (first + r) * PANEL + 16, _mm512_sub_epi32(sum[r][1], added1));
        }
    }
}

thread_local std::vector<char> ROOM;  // kept from call to call: fresh pages cost as much as quantising into them

// `rows` rows from the first on, times the panels from one to another.
template <class T, class O>
void block(const Problem& p, i64 first, i64 rows, i64 panel, i64 last) {
    const i64 steps = p.steps(), pairs = (rows + PAIR - 1) / PAIR, codes = pairs * PAIR * steps * STEP;
    constexpr i64 count = PAIR * PANEL;
    const size_t size = codes + 2 * count * sizeof(int32_t) + pairs * PAIR * sizeof(float);
    if (ROOM.size() < size + 64) ROOM.resize(size + 64);
    int8_t* a = reinterpret_cast<int8_t*>((reinterpret_cast<uintptr_t>(ROOM.data()) + 63) / 64 * 64);
    int32_t* both = reinterpret_cast<int32_t*>(a + codes);  // sums of this block and of the one before
    float* scales = reinterpret_cast<float*>(both + 2 * count);
    const T* x = static_cast<const T*>(p.x) + first * p.stride;
    O* out = static_cast<O*>(p.out) + first * p.n;
    const __m512i flip = _mm512_set1_epi8(p.tiles ? 0 : char(0x80));
    TileConfig before;  // oneDNN keeps settings of its own
    if (p.tiles) {
        _tile_storeconfig(&before);
        _tile_loadconfig(&FULL);
    }
    Leaving<O> leaving{};
    i64 turn = 0, coded = 0;
    const i64 group = std::max<i64>(1, GROUP_CODES / (PANEL * steps * STEP));
    for (; panel < last; panel += group)
        for (i64 t = 0; t < pairs; t++) {
            const char* next = nullptr;
            i64 bytes = 0;
            if (coded < rows) {
                for (i64 r = coded; r < std::min(rows, coded + PAIR); r++) {
                    int8_t* to = a + (r / 16 * steps * 16 + r % 16) * STEP;
                    scales[r] = quantise(x + r * p.stride, p.k, p.phase, flip, to);
                }
                coded += PAIR;
                next = reinterpret_cast<const char*>(x + coded * p.stride);
                bytes = p.stride == p.k ? std::min(PAIR, p.m - first - coded) * p.k * i64(sizeof(T)) : 0;
            }
            Ahead ahead{next, bytes, bytes / (std::min(group, last - panel) * steps) + 64};
            for (i64 each = panel; each < std::min(last, panel + group); each++) {
                const int here = int(std::min(PAIR, rows - t * PAIR));
                const int8_t* from = a + 2 * t * steps * TILE;
                const int8_t* b = static_cast<const int8_t*>(p.packed) + each * (2 * steps * TILE + SUMS);
                O* to = out + t * PAIR * p.n + each * PANEL;
                int32_t* sums = both + count * (turn ^= 1);
                leaving.next = to;
                leaving.next_rows = here;
                if (p.tiles)
                    by_tiles(from, here > 16, b, steps, sums, leaving, ahead);
                else
                    by_vectors(from, here, b, steps, sums);
                leaving.up_to(PAIR);
                leaving = {Panel(p, each * PANEL), sums, scales + t * PAIR, to, nullptr, p.n, here, 0, 0};
            }
        }
    leaving.up_to(PAIR);
    if (p.tiles) _tile_loadconfig(&before);
}

// Rows over threads first, then panels, whose threads quantise the same rows.
template <class T, class O>
void all(const Problem& p) {
    const i64 threads = std::max(1, p.threads), panels = (p.n + PANEL - 1) / PANEL;
    i64 rows = std::min(MOST_ROWS, std::max<i64>(1, MOST_CODES / (p.steps() * STEP) / PAIR) * PAIR);
    rows = std::min(rows, ((p.m + threads - 1) / threads + PAIR - 1) / PAIR * PAIR);
    const i64 down = (p.m + rows - 1) / rows;
    const i64 wide = (panels + std::max<i64>(1, threads / down) - 1) / std::max<i64>(1, threads / down);
    const i64 across = (panels + wide - 1) / wide;
#pragma omp parallel for num_threads(threads) if (threads > 1 && down * across > 1)
    for (i64 task = 0; task < down * across; task++) {
        const i64 first = task / across * rows, panel = task % across * wide;
        block<T, O>(p, first, std::min(rows, p.m - first), panel, std::min(panels, panel + wide));
    }
}

}  // namespace

extern "C" void precimap_int8_tokens(const Problem* p) {
    if (p->x_half)
        p->out_half ? all<uint16_t, uint16_t>(*p) : all<uint16_t, float>(*p);
    else
        p->out_half ? all<float, uint16_t>(*p) : all<float, float>(*p);
}
