// The operator of scheme `int8` for a server that has torch and nothing of precimap: a library that it loads before the package.
//
// Invariant: the kernel is the one that was certified (runtime/x86/tokens.cpp, included as it is), under a namespace of its own, so
// that it can be loaded beside precimap, too. Loaded on a CPU with neither AMX nor AVX-512 VNNI it raises at the first call.
#include <ATen/core/Tensor.h>
#include <ATen/cpu/Utils.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "tokens.cpp"

namespace {

const void* data(const at::Tensor& tensor) { return tensor.const_data_ptr(); }

bool half(const at::Tensor& tensor) {
    const bool is_half = tensor.scalar_type() == at::kBFloat16;
    TORCH_CHECK(is_half || tensor.scalar_type() == at::kFloat, "expected float32 or bfloat16, got ", tensor.scalar_type());
    return is_half;
}

// AMX has to be asked for, once in a process.
bool tiles() {
    static const bool found = __builtin_cpu_supports("amx-int8") && at::cpu::init_amx();
    return found;
}

// As precimap::int8_tokens: x [.., k], packed as pack_codes makes it, scales float32 [n], bias [n] -> [.., n].
at::Tensor int8_tokens(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scales,
                       const std::optional<at::Tensor>& bias, double phase, at::ScalarType dtype) {
    TORCH_CHECK(at::cpu::is_avx512_vnni_supported(), "expected a CPU with AVX-512 VNNI, which this package was made for");
    const int64_t n = scales.numel(), k = x.size(-1);
    const int64_t panels = (n + PANEL - 1) / PANEL, steps = (k + STEP - 1) / STEP;
    TORCH_CHECK(packed.is_contiguous() && packed.dim() == 2 && packed.size(0) == panels && packed.size(1) == PANEL * (steps * STEP + 4),
                "expected codes packed for ", k, " inputs and ", n, " outputs");
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = n;
    at::Tensor out = x.new_empty(shape, x.options().dtype(dtype));
    if (!out.numel()) return out;
    at::Tensor rows = x.dim() == 2 ? x : x.reshape({-1, k});
    if (rows.stride(1) != 1 && k > 1) rows = rows.contiguous();
    const at::Tensor scale = scales.contiguous(), added = bias ? bias->contiguous() : at::Tensor();
    const Problem problem{data(rows), data(packed), data(scale), bias ? data(added) : nullptr, out.mutable_data_ptr(),
                          rows.size(0), n, k, rows.stride(0), half(rows), bias && half(added), half(out),
                          static_cast<float>(phase), tiles(), at::get_num_threads()};
    precimap_int8_tokens(&problem);
    return out;
}

}  // namespace

TORCH_LIBRARY(precimap_served, m) {
    m.def("int8_tokens(Tensor x, Tensor packed, Tensor scales, Tensor? bias, float phase, ScalarType dtype) -> Tensor",
          {at::Tag::pt2_compliant_tag, at::Tag::flexible_layout});
}

TORCH_LIBRARY_IMPL(precimap_served, CPU, m) { m.impl("int8_tokens", &int8_tokens); }
