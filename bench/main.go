// Command bench measures Firn beside its peers: the same client, the same
// machine, one run. It prints what it measures and writes docs/benchmarks.md;
// nothing is asserted on time.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

func main() {
	var o options
	flag.DurationVar(&o.each, "each", 8*time.Second, "how long each job runs")
	flag.StringVar(&o.out, "out", "docs/benchmarks.md", "the page whose measured part is replaced; - prints only")
	flag.StringVar(&o.only, "only", "", "run only the servers whose names contain this")
	flag.BoolVar(&o.disk, "disk", true, "also measure write amplification by fill, and an idle node")
	flag.BoolVar(&o.micro, "micro", true, "also run the micro-benchmarks (go test -bench)")
	flag.StringVar(&o.dir, "dir", "", "folder for the servers' data (default: a temporary one)")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

type options struct {
	each  time.Duration
	out   string
	only  string
	disk  bool
	micro bool
	dir   string
}

// tools are what the comparison needs, with the Debian package of each.
var tools = [][2]string{{"fio", "fio"}, {"nbdkit", "nbdkit"}, {"qemu-nbd", "qemu-utils"}}

func run(ctx context.Context, o options) error {
	for _, t := range tools {
		if _, err := exec.LookPath(t[0]); err != nil {
			return fmt.Errorf("%s is missing: apt-get install -y %s", t[0], t[1])
		}
	}
	dir, err := os.MkdirTemp(o.dir, "firn-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	firn := filepath.Join(dir, "firn")
	if out, err := exec.CommandContext(ctx, "go", "build", "-o", firn, "./cmd/firn").CombinedOutput(); err != nil {
		return fmt.Errorf("build of firn: %w\n%s", err, out)
	}

	var rows []row
	for _, s := range servers(firn) {
		if !strings.Contains(s.name, o.only) {
			continue
		}
		r, err := measure(ctx, s, filepath.Join(dir, strings.ReplaceAll(s.name, " ", "-")), o.each)
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		rows = append(rows, r...)
	}
	front, err := measureNBD(ctx, o, dir)
	if err != nil {
		return err
	}
	disk, err := measureDisk(ctx, firn, dir, o)
	if err != nil {
		return err
	}
	front = append(front, disk...)
	var micro []string
	if o.micro {
		if micro, err = microBenchmarks(ctx); err != nil {
			return err
		}
	}
	page := report(rows, front, micro, o)
	fmt.Print(page)
	if o.out == "-" {
		return nil
	}
	return splice(o.out, page)
}

// row is one job on one server.
type row struct {
	server   string
	replicas int // 0: not Firn
	job      job
	fio      fioResult
	// serverCPU is the processor time of the server's processes per operation;
	// totalCPU adds the client's.
	serverCPU, totalCPU time.Duration
	// device counts what the server wrote to its disks, with the index's part of
	// it up to the next checkpoint.
	device counters
}

func measure(ctx context.Context, s server, dir string, each time.Duration) ([]row, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	run, err := s.start(ctx, dir)
	if err != nil {
		return nil, err
	}
	defer run.stop()
	if err := run.waitReady(ctx); err != nil {
		return nil, err
	}
	// Every server starts from a volume whose blocks were written once, so that
	// reads find data and overwrites find something to overwrite.
	fmt.Fprintf(os.Stderr, "%-34s fill\n", s.name)
	if _, err := runFio(ctx, run.uri, job{name: "fill", rw: "write", blockBytes: 1 << 20, depth: 4}, 0); err != nil {
		return nil, err
	}
	if _, err := run.settled(ctx); err != nil {
		return nil, errors.Join(err, run.died())
	}
	var rows []row
	for _, j := range jobs {
		before, err := run.usage(ctx)
		if err != nil {
			return nil, errors.Join(err, run.died())
		}
		res, err := runFio(ctx, run.uri, j, each)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("job %q: %w", j.name, err), run.died())
		}
		r := row{server: s.name, replicas: s.replicas, job: j, fio: res}
		after, err := run.usage(ctx)
		if err != nil {
			return nil, errors.Join(err, run.died())
		}
		if res.ops > 0 {
			r.serverCPU = (after.cpu - before.cpu) / time.Duration(res.ops)
			r.totalCPU = r.serverCPU + res.clientCPU/time.Duration(res.ops)
		}
		r.device = after.minus(before.counters)
		if !j.settles {
			r.device.index = math.NaN()
		} else {
			settled, err := run.settled(ctx)
			if err != nil {
				return nil, errors.Join(err, run.died())
			}
			r.device.index = settled.index - before.index
		}
		fmt.Fprintf(os.Stderr, "%-34s %-22s %9.0f op/s  median %v  server CPU %v/op\n", s.name, j.name, res.iops, res.median, r.serverCPU)
		rows = append(rows, r)
	}
	return rows, nil
}
