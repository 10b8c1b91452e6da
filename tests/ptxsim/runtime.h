// What translated kernels see of the simulator: types, number formats, memory
// access and the warp and block primitives. The engine itself is runtime.cpp.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef __int128 s128;
typedef unsigned __int128 u128;

struct Cta;
struct Warp;

// One GPU thread. Generated code uses the first group of fields only.
struct Thread {
  u32 tid = 0, lane = 0;
  u32 ctaid[3] = {0, 0, 0};
  u32 line = 0;        // (file index << 24) | source line of the current instruction
  u64 icount = 0;      // executed instructions
  u64 fuel = 0;        // icount at which a backward branch calls watchdog()
  u8 *shared = nullptr;
  u32 shared_size = 0;
  u8 *local = nullptr;  // stack frame in local memory
  u32 local_size = 0;
  Cta *cta = nullptr;
  Warp *warp = nullptr;
  struct ThreadState *state = nullptr;  // engine's own data
};

// A pointer argument. Its virtual addresses have the region's number in their
// top 16 bits, so that an offset cannot lead from one argument to another.
struct Region {
  u64 lo, hi;  // permitted virtual addresses
  s64 delta;   // host address = virtual address + delta
};

struct Launch {
  u32 nctaid[3];
  u32 ntid;
  u32 nregions;
  bool slow_global;  // every global access goes through the engine (race check, interleaving)
  bool slow_shared;
  const Region *regions;
  u64 loads, stores;
};
extern Launch launch;

enum : u64 { LOCAL_ID = 0xfff0, SHARED_ID = 0xfff1, MODULE_ID = 0xfff2 };
enum Access { READ = 0, WRITE = 1, RMW = 2 };
enum Order { WEAK = 0, RELAXED = 1, ACQUIRE = 2, RELEASE = 4, ACQ_REL = 6 };
enum Scope { CTA_SCOPE = 0, GPU_SCOPE = 1 };

// ---- engine entry points -------------------------------------------------
// Checked host pointer of [addr, addr+n), or nullptr after reporting a finding.
u8 *global_access(Thread *t, u64 addr, u32 n, int access, int order, int scope, const void *value);
u8 *shared_access(Thread *t, u32 addr, u32 n, int access, bool atomic, const void *value);
u8 *local_access(Thread *t, u32 addr, u32 n, int access);
u8 *generic_access(Thread *t, u64 addr, u32 n, int access, int order, int scope, const void *value);
void atomic_begin(Thread *t);
void atomic_end(bool changed);
void fence(Thread *t, int scope, int order = ACQ_REL);
void watchdog(Thread *t);
void pause_thread(Thread *t);
[[noreturn]] void trap(Thread *t, const char *kind, const char *message);
void assert_fail(Thread *t, u64 message, u64 file, u32 line, u64 function);
u32 device_printf(Thread *t, u64 format, u64 args);
void barrier(Thread *t, u32 id, u32 count, bool wait);
void warp_sync(Thread *t, u32 site);
u32 shuffle(Thread *t, u32 site, int mode, u32 value, u32 b, u32 c, bool &valid);
u32 vote(Thread *t, u32 site, int mode, bool p);
u32 match(Thread *t, u32 site, bool all, u64 value, bool &pred);
u32 redux(Thread *t, u32 site, int op, u32 value);
void ldmatrix(Thread *t, u32 site, int count, bool transpose, u32 addr, u32 *out);
void stmatrix(Thread *t, u32 site, int count, bool transpose, u32 addr, const u32 *in);
void mma(Thread *t, u32 site, int kind, const u32 *a, const u32 *b, const u32 *c, u32 *d);
void wgmma(Thread *t, u32 site, int kind, int n, const u32 *a, u64 adesc, u64 bdesc, bool a_in_smem,
           bool trans_a, bool trans_b, bool accumulate, float sign_a, float sign_b, u32 *d);
void cp_async(Thread *t, u32 dst, u64 src, u32 size, u32 src_size);
void cp_commit(Thread *t);
void cp_wait(Thread *t, u32 pending);
float round_f32(int op, int mode, float a, float b, float c);
double round_f64(int op, int mode, double a, double b, double c);
float to_f32(long double x, int mode);
double to_f64(long double x, int mode);

// ---- bit patterns and number formats ---------------------------------------
template <class D, class S> static inline D bits(S s) {
  static_assert(sizeof(D) == sizeof(S), "sizes differ");
  D d;
  memcpy(&d, &s, sizeof d);
  return d;
}
static inline float F(u32 x) { return bits<float>(x); }
static inline u32 U(float x) { return bits<u32>(x); }
static inline double FD(u64 x) { return bits<double>(x); }
static inline u64 UD(double x) { return bits<u64>(x); }
static inline u32 nan32(u32 x) { return (x & 0x7fffffffu) > 0x7f800000u ? 0x7fffffffu : x; }
static inline float bf2f(u16 h) { return F(u32(h) << 16); }
static inline u16 f2bf(float f) {
  u32 x = U(f);
  if ((x & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return u16((x + 0x7fff + ((x >> 16) & 1)) >> 16);
}
// double to float, rounded to odd, so that a second rounding is exact
static inline float odd(double d) {
  float f = (float)d;
  if (!(f == f) || (double)f == d || std::isinf(d)) return f;
  u32 x = U(f);
  if (std::fabs((double)f) > std::fabs(d)) x -= 1;
  return F(x | 1);
}
static inline u16 d2bf(double d) { return f2bf(odd(d)); }
static inline float h2f(u16 h) { return (float)bits<_Float16>(h); }
static inline u16 f2h(float f) {
  if (f != f) return 0x7fff;
  return bits<u16>((_Float16)f);
}
static inline u16 d2h(double d) {
  if (d != d) return 0x7fff;
  return bits<u16>((_Float16)odd(d));
}
template <class Widen, class Narrow> static inline u32 add_halves(u32 a, u32 b, Widen widen, Narrow narrow) {
  return (u32)narrow(widen((u16)a) + widen((u16)b)) | (u32)narrow(widen((u16)(a >> 16)) + widen((u16)(b >> 16))) << 16;
}
static inline float ftz(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
static inline float sat(float x) { return x != x ? 0.0f : x < 0 ? 0.0f : x > 1 ? 1.0f : x; }
static inline double sat(double x) { return x != x ? 0.0 : x < 0 ? 0.0 : x > 1 ? 1.0 : x; }
static inline float fp8_to_f(u8 v, int ebits) {  // 4: e4m3fn, 5: e5m2
  int mbits = 7 - ebits, bias = (1 << (ebits - 1)) - 1, e = (v & 0x7f) >> mbits, m = v & ((1 << mbits) - 1);
  float r;
  if (ebits == 5 && e == 31) r = m ? NAN : INFINITY;
  else if (ebits == 4 && (v & 0x7f) == 0x7f) r = NAN;
  else r = e ? std::ldexp(1.0f + (float)m / (1 << mbits), e - bias) : std::ldexp((float)m / (1 << mbits), 1 - bias);
  return (v & 0x80) ? -r : r;
}
static inline u8 f_to_fp8(float x, int ebits) {  // round to nearest even, saturate to finite
  u8 s = (U(x) >> 24) & 0x80;
  if (x != x) return s | 0x7f;
  int mbits = 7 - ebits, bias = (1 << (ebits - 1)) - 1;
  float a = std::fabs(x), top = ebits == 4 ? 448.0f : 57344.0f;
  u8 max = ebits == 4 ? 0x7e : 0x7b;
  if (a >= top) return s | max;
  int e = 0;
  std::frexp(a, &e);
  e -= 1;
  if (a == 0 || e < 1 - bias) e = 1 - bias;
  float q = std::nearbyint(std::ldexp(a, mbits - e));
  u32 code = (u32)q + ((e - (1 - bias)) << mbits);
  return s | (u8)(code > max ? max : code);
}
static inline u32 to_tf32(u32 x, bool nearest_away) {
  if ((x & 0x7fffffff) >= 0x7f800000) return x;
  return (nearest_away ? x + 0x1000 : x + 0xfff + ((x >> 13) & 1)) & 0xffffe000u;
}
template <class T> static inline T fmin_(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}
template <class T> static inline T fmax_(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}
template <class T> static inline T fmin_nan(T a, T b) { return a != a || b != b ? (T)NAN : fmin_(a, b); }
template <class T> static inline T fmax_nan(T a, T b) { return a != a || b != b ? (T)NAN : fmax_(a, b); }
// x is integral already; saturates
template <class D> static inline D to_int(double x, double lo, double hi, D nan) {
  if (x != x) return nan;
  if (x <= lo) return std::numeric_limits<D>::min();
  if (x >= hi) return std::numeric_limits<D>::max();
  return (D)x;
}

// ---- integer helpers ---------------------------------------------------------
template <class T> static inline T idiv(T a, T b) {
  if (b == 0) return (T)-1;
  if ((T)-1 < (T)0 && b == (T)-1) return (T)(0 - (u64)a);
  return a / b;
}
template <class T> static inline T irem(T a, T b) {
  if (b == 0) return a;
  if ((T)-1 < (T)0 && b == (T)-1) return 0;
  return a % b;
}
static inline u32 lop3(u32 a, u32 b, u32 c, u32 lut) {
  u32 r = 0;
  for (int i = 0; i < 8; i++)
    if ((lut >> i) & 1) r |= ((i & 4) ? a : ~a) & ((i & 2) ? b : ~b) & ((i & 1) ? c : ~c);
  return r;
}
static inline u32 prmt(u32 a, u32 b, u32 selector) {
  u64 v = (u64)a | ((u64)b << 32);
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    u32 k = (selector >> (4 * i)) & 15;
    u8 x = (u8)(v >> (8 * (k & 7)));
    if (k & 8) x = (x & 0x80) ? 0xff : 0;
    r |= (u32)x << (8 * i);
  }
  return r;
}
template <class T> static inline T bfe(T v, u32 pos, u32 len, bool is_signed) {
  const u32 w = sizeof(T) * 8;
  pos &= 255;
  len &= 255;
  T x = pos >= w ? (T)(is_signed && (v >> (w - 1)) ? ~(T)0 : 0) : (T)(v >> pos);
  if (len == 0) return 0;
  if (len >= w) return is_signed && pos < w ? (T)((typename std::make_signed<T>::type)v >> pos) : x;
  T mask = ((T)1 << len) - 1;
  u32 top = pos + len - 1 >= w ? w - 1 : pos + len - 1;
  bool neg = is_signed && ((v >> top) & 1);
  x &= mask;
  if (pos + len > w) x &= pos >= w ? 0 : ((T)1 << (w - pos)) - 1;
  if (neg) x |= ~(pos + len > w ? (pos >= w ? (T)0 : (((T)1 << (w - pos)) - 1)) : mask);
  return x;
}
template <class T> static inline T bfi(T field, T base, u32 pos, u32 len) {
  const u32 w = sizeof(T) * 8;
  pos &= 255;
  len &= 255;
  if (pos >= w || len == 0) return base;
  T mask = (len >= w ? ~(T)0 : (((T)1 << len) - 1)) << pos;
  return ((field << pos) & mask) | (base & ~mask);
}
template <class T> static inline T shl(T v, u32 n) { return n >= sizeof(T) * 8 ? (T)0 : (T)(v << n); }
template <class T> static inline T shr(T v, u32 n) {
  const u32 w = sizeof(T) * 8;
  if (n >= w) return (T)-1 < (T)0 && v < 0 ? (T)-1 : (T)0;
  return (T)(v >> n);
}
static inline u32 brev(u32 x) {
  u32 r = 0;
  for (int i = 0; i < 32; i++) r |= ((x >> i) & 1) << (31 - i);
  return r;
}
static inline u32 dp4a(u32 a, u32 b, u32 c, bool sa, bool sb) {
  s32 r = (s32)c;
  for (int i = 0; i < 4; i++) {
    u8 x = a >> (8 * i), y = b >> (8 * i);
    r += (sa ? (s32)(s8)x : (s32)x) * (sb ? (s32)(s8)y : (s32)y);
  }
  return (u32)r;
}

// ---- memory ---------------------------------------------------------------
template <class T, int N> struct alignas(sizeof(T) * N) Vec { T x[N]; };

static inline u8 *fast_global(u64 a, u32 n) {
  u64 id = (a >> 48) - 1;
  if (__builtin_expect(id < launch.nregions && !launch.slow_global, 1)) {
    const Region &r = launch.regions[id];
    if (__builtin_expect(a >= r.lo && a + n <= r.hi && !(a & (n - 1)), 1)) return (u8 *)(a + r.delta);
  }
  return nullptr;
}
template <class V> static inline V ld_global(Thread *t, u64 a, int order = WEAK, int scope = GPU_SCOPE) {
  V v;
  launch.loads++;
  u8 *p = order == WEAK ? fast_global(a, sizeof v) : nullptr;
  if (!p) p = global_access(t, a, sizeof v, READ, order, scope, nullptr);
  if (p) memcpy(&v, p, sizeof v);
  else memset(&v, 0xff, sizeof v);
  return v;
}
template <class V> static inline void st_global(Thread *t, u64 a, V v, int order = WEAK, int scope = GPU_SCOPE) {
  launch.stores++;
  u8 *p = order == WEAK ? fast_global(a, sizeof v) : nullptr;
  if (!p) p = global_access(t, a, sizeof v, WRITE, order, scope, &v);
  if (p) memcpy(p, &v, sizeof v);
}
template <class V> static inline V ld_generic(Thread *t, u64 a, int order = WEAK, int scope = GPU_SCOPE) {
  V v;
  u8 *p = generic_access(t, a, sizeof v, READ, order, scope, nullptr);
  if (p) memcpy(&v, p, sizeof v);
  else memset(&v, 0xff, sizeof v);
  return v;
}
template <class V> static inline void st_generic(Thread *t, u64 a, V v, int order = WEAK, int scope = GPU_SCOPE) {
  u8 *p = generic_access(t, a, sizeof v, WRITE, order, scope, &v);
  if (p) memcpy(p, &v, sizeof v);
}
template <class V> static inline V ld_shared(Thread *t, u32 a) {
  V v;
  u8 *p = !launch.slow_shared && (u64)a + sizeof v <= t->shared_size && !(a & (sizeof v - 1))
              ? t->shared + a
              : shared_access(t, a, sizeof v, READ, false, nullptr);
  if (p) memcpy(&v, p, sizeof v);
  else memset(&v, 0xff, sizeof v);
  return v;
}
template <class V> static inline void st_shared(Thread *t, u32 a, V v) {
  u8 *p = !launch.slow_shared && (u64)a + sizeof v <= t->shared_size && !(a & (sizeof v - 1))
              ? t->shared + a
              : shared_access(t, a, sizeof v, WRITE, false, &v);
  if (p) memcpy(p, &v, sizeof v);
}
template <class V> static inline V ld_local(Thread *t, u32 a) {
  V v;
  u8 *p = local_access(t, a, sizeof v, READ);
  if (p) memcpy(&v, p, sizeof v);
  else memset(&v, 0xff, sizeof v);
  return v;
}
template <class V> static inline void st_local(Thread *t, u32 a, V v) {
  u8 *p = local_access(t, a, sizeof v, WRITE);
  if (p) memcpy(p, &v, sizeof v);
}
template <class T, class Fn>
static inline T atomic_global(Thread *t, u64 a, int order, int scope, Fn fn) {
  atomic_begin(t);
  T old;
  u8 *p = (a >> 48) >= LOCAL_ID ? generic_access(t, a, sizeof old, RMW, order, scope, nullptr)
                                : global_access(t, a, sizeof old, RMW, order, scope, nullptr);
  if (!p) {
    memset(&old, 0xff, sizeof old);
    return old;
  }
  memcpy(&old, p, sizeof old);
  T value = fn(old);
  memcpy(p, &value, sizeof value);
  atomic_end(memcmp(&old, &value, sizeof old) != 0);
  return old;
}
template <class T, class Fn> static inline T atomic_shared(Thread *t, u32 a, Fn fn) {
  atomic_begin(t);
  T old;
  u8 *p = shared_access(t, a, sizeof old, RMW, true, nullptr);
  if (!p) {
    memset(&old, 0xff, sizeof old);
    return old;
  }
  memcpy(&old, p, sizeof old);
  T value = fn(old);
  memcpy(p, &value, sizeof value);
  atomic_end(memcmp(&old, &value, sizeof old) != 0);
  return old;
}
