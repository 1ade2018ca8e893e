// Command run is the whole test command of Firn (`make test`). It installs the
// Debian packages that the end-to-end tests use, or says which are missing and
// fails, then runs the parts one after another, prints each one's time and what
// failed, and ends with a plain line "N passed, N failed". Nothing is skipped:
// a test that cannot run here counts as failed.
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"
)

// part is one step of the whole.
type part struct {
	name string
	run  func(*report)
	// beside starts the part at once, beside those before it: it keeps one
	// processor busy and nothing in it depends on time.
	beside bool
}

// outcome is what a part did. Of a part that runs beside others, what it
// printed is held back until its turn.
type outcome struct {
	report
	took time.Duration
	text bytes.Buffer
	done chan struct{} // closed when the part has ended
}

func (p part) start(out io.Writer) *outcome {
	o := &outcome{done: make(chan struct{})}
	o.out = out
	if p.beside {
		o.out = &o.text
	}
	run := func() {
		begin := time.Now()
		p.run(&o.report)
		o.took = time.Since(begin)
		close(o.done)
	}
	if p.beside {
		go run()
	} else {
		run()
	}
	return o
}

// report counts the results of one part.
type report struct {
	passed, failed int
	// out is where failures and measurements are shown.
	out io.Writer
}

func (r *report) pass() { r.passed++ }

func (r *report) fail(format string, args ...any) {
	r.failed++
	fmt.Fprintf(r.out, "FAIL "+format+"\n", args...)
}

var (
	long     = flag.Bool("long", false, "run the long variants too (FIRN_TEST_LONG=1)")
	only     = flag.String("only", "", "run only these parts, separated by commas")
	fuzzRuns = flag.Int("fuzzruns", 0, "how many inputs each fuzz target tries (default 10000, with -long 200000)")
	seeds    = flag.Int("seeds", 0, "how many seeds the simulation runs (default 50, with -long 200)")
)

func main() {
	flag.Parse()
	length := "short"
	if *long {
		length = "long"
		os.Setenv("FIRN_TEST_LONG", "1")
		*fuzzRuns, *seeds = cmp.Or(*fuzzRuns, 200_000), cmp.Or(*seeds, 200)
	}
	*fuzzRuns, *seeds = cmp.Or(*fuzzRuns, 10_000), cmp.Or(*seeds, 50)
	os.Setenv("FIRN_SIM_SEEDS", strconv.Itoa(*seeds))
	parts := []part{
		{name: "tools", run: tools},
		{name: "format", run: format},
		{name: "vet", run: vet},
		{name: "unit", run: unit},
		{name: "race", run: race},
		{name: "fuzz", run: fuzz},
		{name: "sim", run: func(r *report) { goTest(r, "-timeout", "60m", "./test/sim/...") }, beside: true},
		{name: "e2e", run: func(r *report) { goTest(r, "-count=1", "-timeout", "30m", "./test/e2e/...") }},
		{name: "guest", run: func(r *report) { goTest(r, "-count=1", "-timeout", "40m", "./test/guest/...") }},
	}
	if *long {
		parts = append(parts, part{name: "mutants", run: func(r *report) { command(r, "go", "run", "./test/mutants") }})
	}
	if *only != "" {
		wanted := strings.Split(*only, ",")
		parts = slices.DeleteFunc(parts, func(p part) bool { return !slices.Contains(wanted, p.name) })
		if len(parts) != len(wanted) {
			fmt.Fprintf(os.Stderr, "run: no such part among %q\n", *only)
			os.Exit(2)
		}
	}
	var total report
	start := time.Now()
	started := map[string]*outcome{}
	for _, p := range parts {
		o := started[p.name]
		if o == nil {
			o = p.start(os.Stdout)
		}
		<-o.done
		os.Stdout.Write(o.text.Bytes())
		fmt.Printf("%-8s %-5s %6.1f s   %d passed, %d failed\n", p.name, length, o.took.Seconds(), o.passed, o.failed)
		total.passed += o.passed
		total.failed += o.failed
		if p.name == "tools" && o.failed > 0 {
			break
		}
		for _, q := range parts {
			if q.beside && started[q.name] == nil {
				started[q.name] = q.start(os.Stdout)
			}
		}
	}
	fmt.Printf("total          %6.1f s\n", time.Since(start).Seconds())
	fmt.Printf("%d passed, %d failed\n", total.passed, total.failed)
	if total.failed > 0 {
		os.Exit(1)
	}
}

// tool is a program that tests use, and the Debian package that brings it.
type tool struct{ program, debian string }

var needed = []tool{
	{"nbdinfo", "libnbd-bin"}, {"nbdcopy", "libnbd-bin"}, {"nbdfuse", "libnbd-bin"}, {"qemu-img", "qemu-utils"}, {"qemu-io", "qemu-utils"},
	{"fio", "fio"}, {"nbdkit", "nbdkit"}, {"mkfs.ext4", "e2fsprogs"}, {"mkfs.xfs", "xfsprogs"}, {"etcd", "etcd-server"},
	{"fusermount3", "fuse3"}, {"losetup", "mount"}, {"dockerd", "docker.io"}, {"docker-compose", "docker-compose"}, {"iscsi-test-cu", "libiscsi-bin"},
	{"/usr/lib/x86_64-linux-gnu/qemu/block-iscsi.so", "qemu-block-extra"},
	{"qemu-system-x86_64", "qemu-system-x86"}, {"busybox", "busybox-static"}, {"nbd-client", "nbd-client"}, {"blkdiscard", "util-linux"},
}

// python is a module that has no program of its own.
const pythonModule, pythonDebian = "nbd", "python3-libnbd"

func missing() []string {
	lack := map[string]bool{}
	for _, t := range needed {
		if !found(t.program) {
			lack[t.debian] = true
		}
	}
	// Not in the folder of this repository, whose nbd/ Python takes for a module.
	python := exec.Command("/usr/bin/python3", "-c", "import "+pythonModule)
	python.Dir = "/"
	if python.Run() != nil {
		lack[pythonDebian] = true
	}
	var names []string
	for name := range lack {
		names = append(names, name)
	}
	sort.Strings(names)
	return names
}

// found also looks where a user's PATH often does not; a path is any file.
func found(program string) bool {
	if filepath.IsAbs(program) {
		_, err := os.Stat(program)
		return err == nil
	}
	if _, err := exec.LookPath(program); err == nil {
		return true
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if info, err := os.Stat(filepath.Join(dir, program)); err == nil && info.Mode()&0o111 != 0 {
			return true
		}
	}
	return false
}

func tools(r *report) {
	lack := missing()
	if len(lack) == 0 {
		r.pass()
		return
	}
	if os.Geteuid() == 0 && found("apt-get") {
		fmt.Fprintf(r.out, "installing %s\n", strings.Join(lack, " "))
		install := func() ([]byte, error) {
			cmd := exec.Command("apt-get", append([]string{"install", "-y", "--no-install-recommends"}, lack...)...)
			cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
			return cmd.CombinedOutput()
		}
		out, err := install()
		if err != nil {
			if out, err = exec.Command("apt-get", "update").CombinedOutput(); err == nil {
				out, err = install()
			}
		}
		if err != nil {
			fmt.Fprintf(r.out, "%s\n", tail(out, 20))
		}
		lack = missing()
	}
	if len(lack) > 0 {
		r.fail("the tests need programs that are not here; install them with\n  apt-get install %s", strings.Join(lack, " "))
		return
	}
	r.pass()
}

func tail(out []byte, lines int) string {
	all := strings.Split(strings.TrimSpace(string(out)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// command runs one check that passes or fails as a whole.
func command(r *report, name string, args ...string) string {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		r.fail("%s %s: %v\n%s", name, strings.Join(args, " "), err, tail(out, 60))
		return ""
	}
	r.pass()
	return string(out)
}

func format(r *report) {
	out, err := exec.Command("sh", "-c", "git ls-files '*.go' | grep -v '\\.pb\\.go$' | xargs gofmt -l").CombinedOutput()
	if err != nil || len(out) > 0 {
		r.fail("gofmt: run `make fmt` %v\n%s", err, out)
		return
	}
	r.pass()
}

func vet(r *report) { command(r, "go", "vet", "./...") }

// packages lists the packages that match, without the ones below test/.
func packages(r *report) []string {
	out, err := exec.Command("go", "list", "./...").Output()
	if err != nil {
		r.fail("go list: %v", err)
		return nil
	}
	return slices.DeleteFunc(strings.Fields(string(out)), func(p string) bool {
		return strings.Contains(p, "/test/sim") || strings.Contains(p, "/test/e2e") || strings.Contains(p, "/test/guest")
	})
}

func unit(r *report) { goTest(r, append([]string{"-timeout", "15m"}, packages(r)...)...) }

// raced are the packages with goroutines and locks of their own.
var raced = []string{"./internal/loop/...", "./internal/payload/...", "./internal/vfs/...", "./nbd/...", "./cluster/transport/...", "./cluster/node/...",
	"./cluster/", "./cluster/index/...", "./cluster/meta/...", "./gateway/...", "./cmd/firn/..."}

// racedSkip are those without the tests that take minutes under the race
// detector: crash points run one after the other, libiscsi's suite has its turn
// among the unit tests.
var racedSkip = []struct{ packages, tests string }{
	{"./cluster/seglog", "TestCrashAtEveryCall|TestModelLong"},
	{"./iscsi/...", "TestConformance|TestMultipath"},
}

func race(r *report) {
	goTest(r, append([]string{"-race", "-short", "-timeout", "15m"}, raced...)...)
	for _, s := range racedSkip {
		goTest(r, "-race", "-short", "-timeout", "15m", "-skip", s.tests, s.packages)
	}
}

// event is a line of `go test -json`.
type event struct {
	Action, Package, Test, Output, ImportPath string
	Elapsed                                   float64
}

// goTest runs tests and counts each of them; subtests count too. What a failed
// test printed is shown, and lines that begin with "measured:" of all tests.
func goTest(r *report, args ...string) {
	cmd := exec.Command("go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = r.out
	pipe, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		r.fail("go test: %v", err)
		return
	}
	outputs := map[string]*bytes.Buffer{}
	failedTests := map[string]bool{}
	failures := r.failed
	lines := bufio.NewScanner(pipe)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e event
		if json.Unmarshal(lines.Bytes(), &e) != nil {
			fmt.Fprintln(r.out, lines.Text())
			continue
		}
		key := e.Package + e.ImportPath + " " + e.Test
		switch e.Action {
		case "output", "build-output":
			if _, text, ok := strings.Cut(e.Output, "measured: "); ok {
				fmt.Fprintf(r.out, "  measured: %s", text)
			}
			if outputs[key] == nil {
				outputs[key] = &bytes.Buffer{}
			}
			outputs[key].WriteString(e.Output)
		case "pass":
			if e.Test != "" {
				r.pass()
			}
			delete(outputs, key)
		case "skip":
			if e.Test != "" {
				r.fail("%s skipped itself; a test that cannot run is a failure\n%s", key, outputs[key])
			}
		case "fail", "build-fail":
			// A package fails with its tests; it counts only if no test of it did.
			if e.Test == "" && failedTests[e.Package] {
				continue
			}
			failedTests[e.Package+e.ImportPath] = true
			text := ""
			if outputs[key] != nil {
				text = tail(outputs[key].Bytes(), 80)
			}
			r.fail("%s (%.1f s)\n%s", key, e.Elapsed, text)
		}
	}
	if err := cmd.Wait(); err != nil && r.failed == failures {
		r.fail("go test %s: %v", strings.Join(args, " "), err)
	}
}

// fuzz runs every fuzz target for a while beyond its seeds. The limit is a
// number of inputs: with a time as limit `go test -fuzz` fails now and then
// with "context deadline exceeded", an input being in work when the time ends.
func fuzz(r *report) {
	for _, pkg := range packages(r) {
		out, err := exec.Command("go", "test", "-list", "^Fuzz", pkg).Output()
		if err != nil {
			r.fail("go test -list %s: %v", pkg, err)
			continue
		}
		for _, name := range strings.Fields(string(out)) {
			if strings.HasPrefix(name, "Fuzz") {
				command(r, "go", "test", "-run", "^$", "-fuzz", "^"+name+"$", "-fuzztime", strconv.Itoa(*fuzzRuns)+"x", pkg)
			}
		}
	}
}
