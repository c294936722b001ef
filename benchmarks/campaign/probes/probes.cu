// probes: asks an H100 or H200 what a design with wgmma needs to know, one line of JSON a question.
//
//   probes               every probe in a process of its own, 15 s each
//   probes NAME          one probe
//   probes --list        the names
//   probes --self-test   the index maths on the host, without a device
//
// Exit status: 0 where the probes ran, FAIL being an answer; 1 where they could not (no device, not sm_90, a
// program compiled for another architecture) or the self-test failed; 2 on a wrong argument.
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>

#include "probe.h"

namespace probes {
namespace {

constexpr int kSeconds = 15;  // a probe

__global__ void feature(int* out) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    *out = 1;
#endif
}

std::vector<Probe> everything() {
    std::vector<Probe> out;
    for (const auto& some : {operand_probes(), store_probes(), pipeline_probes(), rate_probes()})
        out.insert(out.end(), some.begin(), some.end());
    return out;
}

void line(const std::string& probe, const char* status, const Answer* answer, std::string note) {
    for (char& c : note)
        if (c == '"' || c == '\\' || c < ' ') c = ' ';
    const std::string figure = answer ? std::to_string(answer->figure) : "null";
    const std::string unit = answer ? "\"" + answer->unit + "\"" : "null";
    printf("{\"probe\": \"%s\", \"status\": \"%s\", \"figure\": %s, \"unit\": %s, \"note\": \"%s\"}\n",
           probe.c_str(), status, figure.c_str(), unit.c_str(), note.c_str());
    fflush(stdout);
}

// The reason why this machine cannot answer; empty where it can.
std::string obstacle() {
    int count = 0, major = 0, minor = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0)
        return std::string("no CUDA device") +
               (error == cudaSuccess ? "" : std::string(": ") + cudaGetErrorString(error));
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "device");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "device");
    if (major != 9 || minor != 0)
        return "needs sm_90, the device is sm_" + std::to_string(major) + std::to_string(minor);
    Buffer<int> out(1);
    feature<<<1, 1>>>(out.data());
    const cudaError_t launch = cudaGetLastError();
    if (launch == cudaErrorNoKernelImageForDevice || (launch == cudaSuccess && !out.values()[0]))
        return "the program was not compiled for sm_90a";
    check(launch, "first kernel");
    return "";
}

int one(const Probe& probe) {
    try {
        const std::string why = obstacle();
        if (!why.empty()) {
            line(probe.name, "SKIPPED", nullptr, why);
            return 1;
        }
        const Answer answer = probe.ask(probe.name);
        line(probe.name, answer.pass ? "PASS" : "FAIL", &answer, answer.note);
    } catch (const std::exception& error) {
        line(probe.name, "FAIL", nullptr, error.what());
    }
    return 0;
}

// Runs `probes NAME` and passes its line on; whether a device could answer.
bool apart(const Probe& probe) {
    using Clock = std::chrono::steady_clock;
    int ends[2];
    if (pipe(ends)) {
        line(probe.name, "FAIL", nullptr, "no pipe");
        return true;
    }
    const pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 1);
        close(ends[0]), close(ends[1]);
        execl("/proc/self/exe", "probes", probe.name.c_str(), nullptr);
        _exit(127);
    }
    close(ends[1]);
    std::string said;
    const auto limit = Clock::now() + std::chrono::seconds(kSeconds);
    bool late = child < 0;
    while (!late) {
        const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(limit - Clock::now());
        pollfd ready{ends[0], POLLIN, 0};
        if (left.count() <= 0 || poll(&ready, 1, int(left.count())) <= 0) {
            late = true;
            break;
        }
        char some[4096];
        const ssize_t got = read(ends[0], some, sizeof some);
        if (got <= 0) break;
        said.append(some, got);
    }
    close(ends[0]);
    int status = 0;
    if (child > 0) {
        if (late) kill(child, SIGKILL);
        // a process that the driver does not let go is left behind after two seconds
        for (int tries = 0; waitpid(child, &status, WNOHANG) == 0 && tries < 200; ++tries) usleep(10000);
    }
    const std::string begin = "{\"probe\": \"" + probe.name + "\"";
    if (said.compare(0, begin.size(), begin) == 0 && said.back() == '\n') {
        printf("%s", said.c_str());
        fflush(stdout);
        return !(WIFEXITED(status) && WEXITSTATUS(status) == 1);
    }
    std::string why = "printed no answer";
    if (late) why = "did not end within " + std::to_string(kSeconds) + " s";
    else if (WIFSIGNALED(status)) why = "ended by signal " + std::to_string(WTERMSIG(status));
    line(probe.name, "FAIL", nullptr, why);
    return true;
}

int self_test() {
    const std::string mistakes =
        operand_mistakes() + store_mistakes() + pipeline_mistakes() + rate_mistakes();
    printf("%sself-test: %s\n", mistakes.c_str(), mistakes.empty() ? "right" : "wrong");
    return !mistakes.empty();
}

}  // namespace
}  // namespace probes

int main(int argc, char** argv) {
    using namespace probes;
    const std::vector<Probe> all = everything();
    const std::string word = argc > 1 ? argv[1] : "";
    if (argc == 1) {
        bool answered = true;
        for (const Probe& probe : all) answered &= apart(probe);
        return !answered;
    }
    if (argc == 2 && word == "--self-test") return self_test();
    for (const Probe& probe : all) {
        if (argc == 2 && word == "--list") puts(probe.name.c_str());
        else if (argc == 2 && word == probe.name) return one(probe);
    }
    if (argc == 2 && word == "--list") return 0;
    fprintf(stderr, "usage: probes [--list | --self-test | NAME]\n");
    return 2;
}
