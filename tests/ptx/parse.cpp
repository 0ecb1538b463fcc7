// The text of a module, as nvcc writes it: every token of it is understood or refused.
#include <algorithm>
#include <cctype>
#include <cstdlib>

#include "module.h"

namespace pddm::ptx {
namespace {

struct Token {
  std::string text;
  int line;
  bool operator==(const char* other) const { return text == other; }
  bool operator!=(const char* other) const { return text != other; }
};

[[noreturn]] void refuse(int line, const std::string& what) {
  throw std::runtime_error("ptx, line " + std::to_string(line) + ": " + what);
}

bool in_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '.' || c == '$' || c == '%';
}

std::vector<Token> tokens_of(const std::string& text) {
  std::vector<Token> tokens;
  int line = 1;
  for (size_t at = 0; at < text.size();) {
    const char c = text[at];
    if (c == '\n') ++line;
    if (std::isspace(static_cast<unsigned char>(c))) {
      ++at;
    } else if (text.compare(at, 2, "//") == 0) {
      at = std::min(text.find('\n', at), text.size());
    } else if (c == '"') {
      const size_t end = text.find('"', at + 1);
      if (end == std::string::npos) refuse(line, "a string without an end");
      tokens.push_back({text.substr(at, end + 1 - at), line});
      at = end + 1;
    } else if (in_word(c)) {
      size_t end = at;
      while (end < text.size() && (in_word(text[end]) || text.compare(end, 2, "::") == 0))
        end += text[end] == ':' ? 2 : 1;
      tokens.push_back({text.substr(at, end - at), line});
      at = end;
    } else if (std::strchr("{}[](),;:@!|+-<>=", c)) {
      tokens.push_back({std::string(1, c), line});
      ++at;
    } else {
      refuse(line, std::string("the character '") + c + "'");
    }
  }
  tokens.push_back({"", line});
  return tokens;
}

struct Type {
  char kind;  // b, u, s, f, p
  size_t bytes;
};

size_t aligned(size_t at, size_t alignment) { return (at + alignment - 1) / alignment * alignment; }

// What a name stands for.
struct Name {
  Type type;  // of a register; kind v: a variable
  uint32_t slot;
};
using Names = std::unordered_map<std::string, Name>;

constexpr struct {
  const char* name;
  Special special;
} kSpecials[] = {{"%tid.x", Special::tid_x},
                 {"%tid.y", Special::tid_y},
                 {"%tid.z", Special::tid_z},
                 {"%ntid.x", Special::ntid_x},
                 {"%ntid.y", Special::ntid_y},
                 {"%ntid.z", Special::ntid_z},
                 {"%ctaid.x", Special::ctaid_x},
                 {"%ctaid.y", Special::ctaid_y},
                 {"%ctaid.z", Special::ctaid_z},
                 {"%nctaid.x", Special::nctaid_x},
                 {"%cluster_ctarank", Special::cluster_ctarank}};

class Parser {
 public:
  Parser(const std::string& text, const HostVariable& host_variable)
      : tokens_(tokens_of(text)), host_variable_(host_variable) {}

  Module module() {
    expect(".version"), next();
    expect(".target"), module_.target = next().text;
    expect(".address_size"), expect("64");
    while (peek() != "") {
      if (accept(".visible") || peek() == ".entry") {
        expect(".entry"), kernel();
      } else if (accept(".global") || accept(".const")) {
        global();
      } else if (accept(".extern")) {
        if (accept(".shared"))
          shared();
        else
          function();
      } else {
        refuse(peek().line,
               "'" + peek().text + "'; accepted are .entry, .global, .const, .extern .shared and .extern .func");
      }
    }
    return std::move(module_);
  }

 private:
  const Token& peek(size_t ahead = 0) const { return tokens_[std::min(at_ + ahead, tokens_.size() - 1)]; }
  const Token& next() {
    const Token& token = peek();
    if (at_ + 1 < tokens_.size()) ++at_;
    return token;
  }
  bool accept(const char* text) {
    if (peek() != text) return false;
    next();
    return true;
  }
  void expect(const char* text) {
    if (peek() != text) refuse(peek().line, "'" + peek().text + "' where '" + text + "' is expected");
    next();
  }

  // --- Declarations --------------------------------------------------------------------------------------------------

  Type type() {
    const Token& token = next();
    static const std::map<std::string, Type> all = {
        {".pred", {'p', 1}}, {".b8", {'b', 1}},  {".b16", {'b', 2}}, {".b32", {'b', 4}}, {".b64", {'b', 8}},
        {".u8", {'u', 1}},   {".u16", {'u', 2}}, {".u32", {'u', 4}}, {".u64", {'u', 8}}, {".s8", {'s', 1}},
        {".s16", {'s', 2}},  {".s32", {'s', 4}}, {".s64", {'s', 8}}, {".f32", {'f', 4}}, {".f64", {'f', 8}}};
    const auto found = all.find(token.text);
    if (found == all.end()) refuse(token.line, "the type '" + token.text + "'");
    return found->second;
  }

  uint64_t natural() {
    const Token& token = next();
    char* end = nullptr;
    const uint64_t x = std::strtoull(token.text.c_str(), &end, 0);
    if (!std::isdigit(static_cast<unsigned char>(token.text[0])) || *end)
      refuse(token.line, "'" + token.text + "' where a number is expected");
    return x;
  }

  struct Declared {
    std::string name;
    Type type;
    size_t alignment, bytes;
  };
  // [.align a] type name [ '[' count ']' ]; of no bytes where the count is missing.
  Declared declaration() {
    size_t alignment = 0;
    if (accept(".align")) alignment = natural();
    Declared d{"", type(), alignment, 0};
    d.name = next().text, d.bytes = d.type.bytes;
    if (!d.alignment) d.alignment = d.bytes;
    if (accept("[")) {
      d.bytes = peek() == "]" ? 0 : natural() * d.type.bytes;
      expect("]");
    }
    return d;
  }

  void global() {
    const int line = peek().line;
    const Declared d = declaration();
    void* at = nullptr;
    if (accept("=")) {
      at = own(d.bytes);
      const bool many = accept("{");
      for (size_t e = 0; many ? peek() != "}" : e == 0; ++e) {
        if (e) expect(",");
        const uint64_t x = natural();
        if ((e + 1) * d.type.bytes > d.bytes) refuse(line, "more values than '" + d.name + "' has");
        std::memcpy(static_cast<unsigned char*>(at) + e * d.type.bytes, &x, d.type.bytes);
      }
      if (many) expect("}");
    } else {
      if (host_variable_) at = host_variable_(d.name);
      if (!at) at = own(d.bytes);
    }
    expect(";");
    variables_[d.name] = reinterpret_cast<uint64_t>(at);
  }
  void* own(size_t bytes) {
    module_.variables.emplace_back(new uint64_t[bytes / 8 + 1]());
    return module_.variables.back().get();
  }

  // The memory that the launch asks for; all such names are one place.
  void shared() {
    const Declared d = declaration();
    if (d.bytes) refuse(peek().line, "shared memory of a size of its own; accepted is what the launch gives");
    expect(";");
    variables_[d.name] = kSharedFirst;
  }

  void function() {
    expect(".func");
    const int line = peek().line;
    bool prints = false;
    while (!accept(";") && peek() != "") prints |= next() == "vprintf";
    if (!prints) refuse(line, "a function; accepted is vprintf");
  }

  // --- Kernels -------------------------------------------------------------------------------------------------------

  void kernel() {
    Kernel k;
    kernel_ = &k, scopes_.assign(1, {}), constants_.clear(), labels_.clear(), jumps_.clear();
    k.name = next().text;
    expect("(");
    while (!accept(")")) {
      expect(".param");
      const Declared d = declaration();
      const size_t offset = aligned(k.parameter_bytes, d.alignment);
      k.parameters.push_back({d.name, offset, d.bytes, d.alignment});
      k.parameter_bytes = offset + d.bytes;
      variable(d.name, kParameterFirst + offset);
      accept(",");
    }
    k.with_calls_bytes = k.parameter_bytes;
    while (!accept("{")) {
      if (accept(".maxntid")) {
        k.max_threads = unsigned(natural());
        while (accept(",")) k.max_threads *= unsigned(natural());
      } else if (accept(".minnctapersm")) {
        natural();
      } else if (accept(".reqnctapercluster")) {
        k.cluster = unsigned(natural());
        while (accept(",")) k.cluster *= unsigned(natural());
      } else if (!accept(".explicitcluster")) {
        refuse(peek().line, "'" + peek().text +
                                "' before a kernel's body; accepted are .maxntid, .minnctapersm, .explicitcluster and "
                                ".reqnctapercluster");
      }
    }
    for (scopes_.emplace_back(); scopes_.size() > 1;) {
      if (accept("{"))
        scopes_.emplace_back();
      else if (accept("}"))
        scopes_.pop_back();
      else
        statement();
    }
    emit("ret", peek().line, kNoGuard, false);
    for (const auto& [operand, label] : jumps_) {
      const auto found = labels_.find(label.text);
      if (found == labels_.end()) refuse(label.line, "the label '" + label.text + "' is nowhere");
      k.operands[operand] = found->second;
    }
    first_use_.push_back(uses_.size());
    for (size_t i = k.code.size(); i-- > 0;) {
      Instruction &here = k.code[i], *const next = &here + 1;
      here.operands = k.operands.data() + firsts_[i];
      if (i + 1 < k.code.size() && many_[i] && many_[i + 1] && here.run == next->run)
        here.alike = uint8_t(std::min(next->alike + 1, 255));
    }
    share_slots(k, uses_, first_use_, registers_);
    firsts_.clear(), uses_.clear(), first_use_.clear(), many_.clear(), registers_.clear();
    const std::string name = k.name;
    if (!module_.kernels.emplace(name, std::move(k)).second) refuse(peek().line, "a second kernel '" + name + "'");
  }

  uint32_t slot(uint64_t value, bool of_register = false) {
    kernel_->initial.push_back(value), registers_.push_back(of_register);
    return uint32_t(kernel_->initial.size() - 1);
  }
  uint32_t constant(uint64_t value) {
    const auto found = constants_.find(value);
    return found != constants_.end() ? found->second : constants_[value] = slot(value);
  }
  void name(const std::string& name, Name is) {
    if (!scopes_.back().emplace(name, is).second) refuse(peek().line, "a second '" + name + "'");
  }
  void variable(const std::string& called, uint64_t address) { name(called, {{'v', 8}, constant(address)}); }

  void statement() {
    if (peek(1) == ":") {
      const Token& label = next();
      next();
      if (!labels_.emplace(label.text, uint32_t(kernel_->code.size())).second)
        refuse(label.line, "a second label '" + label.text + "'");
    } else if (accept(".reg")) {
      registers();
    } else if (accept(".local")) {
      const Declared d = declaration();
      expect(";");
      const size_t offset = aligned(kernel_->local_bytes, d.alignment);
      kernel_->local_bytes = offset + d.bytes;
      variable(d.name, kLocalFirst + offset);
    } else if (accept(".param")) {
      const Declared d = declaration();
      expect(";");
      const size_t offset = aligned(kernel_->with_calls_bytes, 16);
      kernel_->with_calls_bytes = offset + d.bytes;
      variable(d.name, kParameterFirst + offset);
    } else if (accept(".pragma")) {
      const Token& pragma = next();
      if (pragma != "\"nounroll\"" && pragma.text.rfind("\"used_bytes_mask ", 0) != 0)
        refuse(pragma.line, "the pragma " + pragma.text);
      expect(";");
    } else {
      instruction();
    }
  }

  void registers() {
    const Type of = type();
    do {
      const std::string called = next().text;
      size_t count = 1;
      const bool numbered = accept("<");
      if (numbered) count = natural(), expect(">");
      for (size_t r = 0; r < count; ++r)
        name(numbered ? called + std::to_string(r) : called, {of, slot(of.kind == 'p' ? 1 : ~uint64_t(0), true)});
    } while (accept(","));
    expect(";");
  }

  // --- Instructions --------------------------------------------------------------------------------------------------

  const Name* find(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->find(name);
      if (found != scope->end()) return &found->second;
    }
    return nullptr;
  }

  void emit(const std::string& opcode, int line, uint32_t guard, bool unless) {
    const Form* const form = find_form(opcode);
    if (!form) refuse(line, "the instruction '" + text_ + "': '" + opcode + "' is not among those that are known");
    firsts_.push_back(kernel_->operands.size()), first_use_.push_back(uses_.size());
    kernel_->code.push_back({form->run, nullptr, guard, unless, form->flow});
    many_.push_back(form->many && guard == kNoGuard);
    if (opcode.rfind("fence.proxy.async", 0) == 0) kernel_->shows_stores = true;
    kernel_->text.push_back("ptx, line " + std::to_string(line) + ": " + text_);
    form_ = form, opcode_ = opcode;
  }

  void instruction() {
    const int line = peek().line;
    text_.clear();
    for (size_t ahead = 0; peek(ahead) != ";" && peek(ahead) != ""; ++ahead) {
      const std::string& word = peek(ahead).text;
      const bool tight = text_.empty() || std::strchr(",]})+|", word[0]) || std::strchr("@![{(+|-", text_.back());
      text_ += (tight ? "" : " ") + word;
    }
    uint32_t guard = kNoGuard;
    bool unless = false;
    if (accept("@")) {
      unless = accept("!");
      const Token& token = next();
      const Name* const found = find(token.text);
      if (!found || found->type.kind != 'p') wrong(line, "'" + token.text + "' is no predicate");
      guard = found->slot;
    }
    std::string opcode = next().text;
    // Packing and unpacking are forms of their own.
    if (opcode.rfind("mov.", 0) == 0) opcode += peek() == "{" ? " to {}" : peek(2) == "{" ? " of {}" : "";
    // Forms that differ in their operands alone.
    if (opcode.rfind("wgmma.mma_async", 0) == 0 && left_in_registers()) opcode += " of {}";
    if (opcode == "bar.sync" && peek(1) == ",") opcode += " of some";
    emit(opcode, line, guard, unless);
    if (opcode == "call.uni")
      call();
    else
      operands(line);
    if (peek() != ";") wrong(line, "'" + peek().text + "' after its operands");
    next();
  }

  // {…}, {…
  bool left_in_registers() const {
    size_t ahead = 0;
    while (peek(ahead) != "}" && peek(ahead) != ";" && peek(ahead) != "") ++ahead;
    return peek(ahead + 2) == "{";
  }

  [[noreturn]] void wrong(int line, const std::string& what) const {
    refuse(line, "the instruction '" + text_ + "': " + what);
  }

  // call.uni (result), vprintf, (format, arguments)
  void call() {
    const auto parameter = [&] {
      const Token& token = next();
      const Name* const found = find(token.text);
      if (!found || found->type.kind != 'v') wrong(token.line, "'" + token.text + "' is no parameter");
      uses_.push_back({uint32_t(kernel_->operands.size()), Access::read});
      kernel_->operands.push_back(found->slot);
    };
    expect("("), parameter(), expect(")"), expect(","), expect("vprintf"), expect(",");
    expect("("), parameter(), expect(","), parameter(), expect(")");
  }

  void operands(int line) {
    bool first = opcode_.rfind("bar.", 0) != 0;  // what is written comes first
    const std::string& wanted = form_->operands;
    for (size_t at = 0; at < wanted.size(); first = false) {
      if (at) expect(",");
      if (wanted[at] == '{') {
        const size_t end = wanted.find('}', at);
        expect("{");
        for (size_t e = at + 1; e < end; ++e) {
          if (e > at + 1) expect(",");
          operand(wanted[e], line, first);
        }
        expect("}");
        at = end + 1;
      } else {
        operand(wanted[at++], line, first);
        for (; at < wanted.size() && wanted[at] == '|'; at += 2) {
          expect("|");
          operand(wanted[at + 1], line, true);
        }
      }
    }
  }

  void operand(char wanted, int line, bool written) {
    const uint32_t first = uint32_t(kernel_->operands.size());
    push_operand(wanted, line, written);
    if (!std::strchr("phwlfdxm", wanted)) return;
    const bool products = opcode_.rfind("wgmma.mma_async", 0) == 0;
    uses_.push_back({first, products ? Access::kept : written && wanted != 'm' ? Access::written : Access::read});
  }
  void push_operand(char wanted, int line, bool written) {
    std::vector<uint32_t>& out = kernel_->operands;
    if (written && std::strchr("phwlfdx", wanted)) {
      const Name* const found = find(peek().text);
      if (!found || found->type.kind == 'v') wrong(line, "'" + peek().text + "' is no register to write to");
    }
    switch (wanted) {
      case 'p': return out.push_back(value({'p', 1}));
      case 'h': return out.push_back(value({'u', 2}));
      case 'w': return out.push_back(value({'u', 4}));
      case 'l': return out.push_back(value({'u', 8}));
      case 'f': return out.push_back(value({'f', 4}));
      case 'd': return out.push_back(value({'f', 8}));
      case 'm': return address();
      case '_': return expect("_");
      case 'n': return out.push_back(uint32_t(natural()));
      case 'x': {
        if (!peek().text.empty() && peek().text[0] != '%' && !find(peek().text)) {  // a number to store
          out.push_back(value({'u', form_->bytes})), out.push_back(uint32_t(form_->bytes));
          return;
        }
        const Token& token = next();
        const Name* const found = find(token.text);
        if (!found || found->type.kind == 'p' || found->type.bytes < form_->bytes || found->type.kind == 'v' ||
            (found->type.kind == 'f' && (!untyped() || found->type.bytes != form_->bytes)))
          wrong(line, "'" + token.text + "' is no integer register of " + std::to_string(form_->bytes) + " bytes");
        out.push_back(found->slot), out.push_back(uint32_t(found->type.bytes));
        return;
      }
      case 'L': jumps_.emplace_back(out.size(), next()); return out.push_back(0);
    }
    throw std::logic_error(std::string("ptx: the operand kind '") + wanted + "'");
  }

  // Whether the instruction is one of bits, for whatever type.
  bool untyped() const {
    const size_t last = opcode_.rfind('.');
    return last != std::string::npos && opcode_[last + 1] == 'b';
  }

  uint32_t of_name(const Token& token, Type wanted) {
    const Name* const found = find(token.text);
    if (!found) {
      for (const auto& s : kSpecials) {
        if (token.text != s.name) continue;
        if (wanted.bytes != 4) wrong(token.line, token.text + " has 4 bytes");
        const uint32_t at = slot(0);
        kernel_->specials.emplace_back(at, s.special);
        return at;
      }
      const auto outside = variables_.find(token.text);
      if (outside == variables_.end()) wrong(token.line, "'" + token.text + "' is unknown");
      return address_of(token, outside->second, wanted);
    }
    if (found->type.kind == 'v') return address_of(token, kernel_->initial[found->slot], wanted);
    const bool number = found->type.kind == 'f', integer = found->type.kind == 'u' || found->type.kind == 's';
    // Of a wider register cvt reads what it needs.
    const bool reads = kernel_->operands.size() > firsts_.back();
    const bool narrowed = opcode_.rfind("cvt.", 0) == 0 && reads && wanted.kind == 'u' && !number;
    if ((narrowed ? found->type.bytes < wanted.bytes : found->type.bytes != wanted.bytes) ||
        (found->type.kind == 'p') != (wanted.kind == 'p') || (wanted.kind == 'u' && number && !untyped()) ||
        (wanted.kind == 'f' && integer))
      wrong(token.line, "'" + token.text + "' is not of the operand's type");
    return found->slot;
  }
  uint32_t address_of(const Token& token, uint64_t address, Type wanted) {
    if (opcode_.rfind("mov.", 0) != 0 || wanted.kind != 'u' || (wanted.bytes == 4 && address >> 32) || wanted.bytes < 4)
      wrong(token.line, "the address of '" + token.text + "'; accepted in mov of 64 bits, and of 32 for shared memory");
    return constant(address);
  }

  uint32_t value(Type wanted) {
    const Token& token = peek();
    const bool minus = token == "-";
    const std::string& digits = minus ? peek(1).text : token.text;
    if (digits.empty() || !std::isdigit(static_cast<unsigned char>(digits[0]))) {
      next();
      return of_name(token, wanted);
    }
    if (minus) next();
    const bool single = digits[0] == '0' && (digits[1] == 'f' || digits[1] == 'F');
    const bool twice = digits[0] == '0' && (digits[1] == 'd' || digits[1] == 'D');
    if (single || twice) {
      const size_t bytes = single ? 4 : 8;
      if (minus || digits.size() != 2 + 2 * bytes || wanted.kind != 'f' || wanted.bytes != bytes)
        wrong(token.line, "the number '" + digits + "'");
      next();
      return constant(std::strtoull(digits.c_str() + 2, nullptr, 16));
    }
    const uint64_t size = natural(), bits = minus ? -size : size;
    if (wanted.kind == 'p') return constant(size != 0);
    const unsigned width = unsigned(wanted.bytes) * 8;
    const bool fits = width == 64 || (minus ? size <= uint64_t(1) << (width - 1) : size >> width == 0);
    if (wanted.kind == 'f' || !fits) wrong(token.line, "the number '" + digits + "'");
    return constant(bits);
  }

  // [register], [variable], either with + number.
  void address() {
    expect("[");
    const Token& token = next();
    const Name* const found = find(token.text);
    uint32_t at = 0;
    bool narrow = false;
    if (found && (found->type.kind == 'v' || (found->type.bytes >= 4 && found->type.kind != 'f'))) {
      at = found->slot, narrow = found->type.bytes == 4;
    } else {
      const auto outside = variables_.find(token.text);
      if (found || outside == variables_.end()) wrong(token.line, "'" + token.text + "' is no address");
      at = constant(outside->second);
    }
    int64_t offset = 0;
    if (accept("+")) {
      const bool minus = accept("-");
      offset = int64_t(natural()) * (minus ? -1 : 1);
      if (offset != int32_t(offset)) wrong(token.line, "the offset " + std::to_string(offset));
    }
    expect("]");
    kernel_->operands.insert(kernel_->operands.end(), {at, uint32_t(int32_t(offset)), uint32_t(narrow)});
  }

  std::vector<Token> tokens_;
  size_t at_ = 0;
  const HostVariable& host_variable_;
  Module module_;
  std::unordered_map<std::string, uint64_t> variables_;  // of the module

  // Of the kernel that is being read.
  Kernel* kernel_ = nullptr;
  std::vector<Names> scopes_;
  std::unordered_map<uint64_t, uint32_t> constants_;
  std::unordered_map<std::string, uint32_t> labels_;
  std::vector<std::pair<size_t, Token>> jumps_;
  std::vector<size_t> firsts_, first_use_;  // operands and uses, of the instructions
  std::vector<Use> uses_;
  std::vector<bool> many_;       // which instructions may be run with others
  std::vector<bool> registers_;  // which slots are registers'

  // Of the instruction.
  std::string text_, opcode_;
  const Form* form_ = nullptr;
};

}  // namespace

Module parse(const std::string& text, const HostVariable& host_variable) {
  return Parser(text, host_variable).module();
}

const Kernel& Module::kernel(const std::string& name) const {
  const auto found = kernels.find(name);
  if (found == kernels.end()) throw std::runtime_error("ptx: the module has no kernel '" + name + "'");
  return found->second;
}

}  // namespace pddm::ptx
