// Runs a package of AOTInductor, as `precimap export --to aoti` writes it, without Python: a server's inner loop in fifty lines.
//
//   serve_package model.pt2 inputs.pt outputs.pt [library.so]
//
// inputs.pt: a list of calls, each the list of the model's tensors in their order, as torch.save([[x, ids], ...], "inputs.pt")
// writes it. library.so: libprecimap_int8.so, where the export wrote one. outputs.pt: for each call the tensors that the model returns, to be read by torch.load.
//
// Build it with the headers and libraries of the torch that wrote the package (T = the folder of `import torch`):
//   g++ -std=c++20 serve_package.cpp -o serve_package -I$T/include -I$T/include/torch/csrc/api/include -L$T/lib
//       -Wl,-rpath,$T/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <vector>

static std::vector<char> read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(std::string("cannot read ") + path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

int main(int count, char** given) try {
  if (count != 4 && count != 5) {
    std::cerr << "expected: serve_package model.pt2 inputs.pt outputs.pt [library.so]\n";
    return 2;
  }
  if (count == 5 && !dlopen(given[4], RTLD_NOW | RTLD_GLOBAL)) throw std::runtime_error(dlerror());
  c10::InferenceMode without_gradients;
  torch::inductor::AOTIModelPackageLoader model(given[1]);
  std::vector<c10::IValue> answers;
  const c10::IValue calls = torch::jit::pickle_load(read(given[2]));
  for (const c10::IValue& call : calls.toListRef()) {
    std::vector<at::Tensor> inputs;
    for (const c10::IValue& input : call.toListRef()) inputs.push_back(input.toTensor());
    const std::vector<at::Tensor> outputs = model.run(inputs);
    answers.push_back(c10::ivalue::Tuple::create(std::vector<c10::IValue>(outputs.begin(), outputs.end())));
  }
  const std::vector<char> written = torch::jit::pickle_save(c10::ivalue::Tuple::create(answers));
  std::ofstream(given[3], std::ios::binary).write(written.data(), written.size());
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
