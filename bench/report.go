package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"
)

// microPackages have benchmarks of single parts worth a line on the page.
var microPackages = []string{"./internal/loop", "./internal/payload", "./nbd/...", "./cluster/..."}

func microBenchmarks(ctx context.Context) ([]string, error) {
	cmd := exec.CommandContext(ctx, "go", append([]string{"test", "-run", "^$", "-bench", ".", "-benchtime", "200ms", "-benchmem", "-timeout", "20m"}, microPackages...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("micro-benchmarks: %w\n%s", err, out)
	}
	var lines []string
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(line, "Benchmark") || strings.HasPrefix(line, "pkg:") {
			lines = append(lines, strings.TrimRight(line, "\n"))
		}
	}
	return lines, nil
}

// The measured part of docs/benchmarks.md stands between these lines.
const (
	beginMark = "<!-- measured: begin (written by make bench) -->"
	endMark   = "<!-- measured: end -->"
)

func report(rows []row, front, micro []string, o options) string {
	var b strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	p("%s", beginMark)
	p("Measured %s on %d processors (%s), %v a job, a volume of %d MiB, written once before. Client: fio with its nbd engine, one connection.",
		time.Now().Format(time.DateOnly), runtime.NumCPU(), cpuModel(), o.each, volumeBytes>>20)
	p("Absolute numbers are this machine's; compare the columns of one table.")
	peers := serverNames(rows)
	for _, j := range jobs {
		p("\n### %s in flight\n", j.name)
		p("| server | op/s | MiB/s | median | p99 | server CPU/op | with the client's | log bytes/user byte | index bytes/user byte | syncs/op |")
		p("|---|---|---|---|---|---|---|---|---|---|")
		for _, s := range peers {
			for _, r := range rows {
				if r.server == s && r.job == j {
					p("%s", r.cells())
				}
			}
		}
	}
	for _, l := range front {
		p("%s", l)
	}
	if len(micro) > 0 {
		p("\n### Single parts (`go test -bench`)\n\n```")
		for _, l := range micro {
			p("%s", l)
		}
		p("```")
	}
	p("%s", endMark)
	return b.String()
}

func serverNames(rows []row) (names []string) {
	seen := map[string]bool{}
	for _, r := range rows {
		if !seen[r.server] {
			seen[r.server] = true
			names = append(names, r.server)
		}
	}
	return names
}

func (r row) cells() string {
	ratio := func(part float64) string {
		if !r.job.writes() || part == 0 {
			return "-"
		}
		return fmt.Sprintf("%.2f", part/float64(r.fio.bytes))
	}
	syncs := "-"
	if r.device.syncs > 0 && r.fio.ops > 0 {
		syncs = fmt.Sprintf("%.2f", r.device.syncs/float64(r.fio.ops))
	}
	us := func(d time.Duration) string { return fmt.Sprintf("%.0f us", float64(d)/1e3) }
	return fmt.Sprintf("| %s | %.0f | %.0f | %s | %s | %s | %s | %s | %s | %s |", r.server, r.fio.iops, r.fio.bytesPerSec/(1<<20),
		us(r.fio.median), us(r.fio.p99), us(r.serverCPU), us(r.totalCPU), ratio(r.device.log), ratio(r.device.index), syncs)
}

func cpuModel() string {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "unknown"
	}
	for line := range strings.Lines(string(info)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
			return strings.TrimSpace(v)
		}
	}
	return "unknown"
}

// splice replaces the measured part of the page at path.
func splice(path, measured string) error {
	page, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before, rest, ok1 := bytes.Cut(page, []byte(beginMark))
	_, after, ok2 := bytes.Cut(rest, []byte(endMark+"\n"))
	if !ok1 || !ok2 {
		return fmt.Errorf("%s has no lines %q and %q to put the measurements between", path, beginMark, endMark)
	}
	return os.WriteFile(path, append(append(before, measured...), after...), 0o644)
}
