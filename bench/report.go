package main

import (
	"bytes"
	"context"
	"fmt"
	"math"
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
	p("Log bytes are batches: entries and headers. Survivors that collection moved and spare segments zeroed ahead are apart; index bytes include the checkpoint of what the job wrote, which is waited for after one job.")
	aims(rows, micro, p)
	peers := serverNames(rows)
	for _, j := range jobs {
		p("\n### %s in flight\n", j.name)
		p("| server | op/s | MiB/s | median | p99 | server CPU/op | with the client's | allocations/op | log bytes/user byte | moved | zeroed | index bytes/user byte | syncs/op |")
		p("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
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
		if !r.job.writes() || !r.device.measured || r.fio.bytes == 0 || math.IsNaN(part) {
			return "-"
		}
		return fmt.Sprintf("%.2f", part/float64(r.fio.bytes))
	}
	perOp := func(n float64) string {
		if !r.device.measured || r.fio.ops == 0 {
			return "-"
		}
		return fmt.Sprintf("%.2f", n/float64(r.fio.ops))
	}
	cost := func(d time.Duration) string {
		if r.fio.ops == 0 {
			return "-"
		}
		return micros(d)
	}
	return fmt.Sprintf("| %s | %.0f | %.0f | %s | %s | %s | %s | %s | %s | %s | %s | %s | %s |", r.server, r.fio.iops, r.fio.bytesPerSec/(1<<20),
		cost(r.fio.median), cost(r.fio.p99), cost(r.serverCPU), cost(r.totalCPU), perOp(r.device.mallocs),
		ratio(r.device.batches), ratio(r.device.moved), ratio(r.device.zeroed), ratio(r.device.index), perOp(r.device.syncs))
}

func micros(d time.Duration) string { return fmt.Sprintf("%.0f us", float64(d)/1e3) }

// aims puts what was measured beside what it should be. Nothing is printed of
// what was not measured.
func aims(rows []row, micro []string, p func(string, ...any)) {
	p("\n### Aims\n\n| what | aim | server | measured |\n|---|---|---|---|")
	for _, r := range rows {
		if r.replicas == 0 || r.job.rw != "randwrite" || r.fio.ops == 0 || !r.device.measured {
			continue
		}
		perReplica := (r.device.batches + r.device.index) / float64(r.fio.bytes) / float64(r.replicas)
		switch {
		case r.job.depth == 1 && r.replicas == 3:
			p("| 4 KiB random write, 1 in flight, median | <= 600 us | %s | %s |", r.server, micros(r.fio.median))
		case r.job.depth == 32:
			if r.replicas == 3 {
				p("| 4 KiB random write, 32 in flight | >= 10000/s | %s | %.0f/s |", r.server, r.fio.iops)
				p("| CPU of all processes for a replicated 4 KiB write | <= 100 us | %s | %s |", r.server, micros(r.totalCPU))
			}
			p("| log and index bytes per user byte and replica, 32 in flight | <= 1.15 | %s | %.2f |", r.server, perReplica)
		}
	}
	for _, l := range micro {
		if f := strings.Fields(l); strings.HasPrefix(l, "BenchmarkReaderPath") && len(f) > 2 {
			p("| allocations of the NBD reader path | 0 | %s | %s |", f[0], f[len(f)-2])
		}
	}
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
