// Command nbdload loads an NBD server and reports what that cost on both sides:
//
//	nbdload -pid PID -depth 32 -bytes 4096 127.0.0.1:10809 vol
//	nbdload -serve unix:/tmp/s
//
// The second form serves a gigabyte of memory through Firn's NBD server, the
// peer of `nbdkit memory`.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"firn.io/firn/internal/block/blocktest"
	"firn.io/firn/nbd"
	"firn.io/firn/nbd/client"
	"firn.io/firn/nbd/device"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "nbdload:", err)
		os.Exit(1)
	}
}

// settings are what the flags say.
type settings struct {
	load        client.Load
	connections int
	time        time.Duration
	fill        bool
	pid         int
	json        bool
}

func run() error {
	var s settings
	serve := flag.String("serve", "", "serve a gigabyte of memory at HOST:PORT or unix:PATH instead")
	workers := flag.Bool("no-lending", false, "with -serve: answer reads by workers, as those that miss memory are")
	flag.IntVar(&s.load.Depth, "depth", 1, "requests in flight on each connection")
	flag.IntVar(&s.load.Bytes, "bytes", 4096, "length of a request")
	flag.Int64Var(&s.load.Span, "span", 256<<20, "bytes of the export that are used, from its start")
	flag.BoolVar(&s.load.Write, "write", false, "write instead of read")
	flag.BoolVar(&s.load.Sequential, "sequential", false, "in order instead of at random")
	flag.IntVar(&s.connections, "connections", 1, "connections")
	flag.DurationVar(&s.time, "time", 5*time.Second, "how long")
	flag.BoolVar(&s.fill, "fill", false, "write the span once before")
	flag.IntVar(&s.pid, "pid", 0, "process of the server, to report its CPU time")
	flag.BoolVar(&s.json, "json", false, "report as JSON")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if *serve != "" {
		return serveMemory(ctx, *serve, *workers)
	}
	if flag.NArg() < 1 || flag.NArg() > 2 {
		return errors.New("usage: nbdload [flags] ADDRESS [EXPORT]; -help shows the flags")
	}
	r, err := s.measure(ctx, flag.Arg(0), flag.Arg(1))
	if err != nil {
		return err
	}
	if s.json {
		return json.NewEncoder(os.Stdout).Encode(r)
	}
	fmt.Printf("%.0f op/s, %.0f MiB/s, median %.0f us, p99 %.0f us; CPU per operation: server %.2f us, client %.2f us\n",
		r.PerSecond, r.MiBPerSecond, r.MedianMicros, r.P99Micros, r.ServerMicros, r.ClientMicros)
	return nil
}

func serveMemory(ctx context.Context, addr string, workers bool) error {
	d := blocktest.New(blocktest.Options{Name: "vol", Bytes: 1 << 30, NoLending: workers})
	l, err := nbd.Listen(ctx, addr)
	if err != nil {
		return err
	}
	s := nbd.NewServer(nbd.Fixed{*device.Export(d, nil)}, nbd.Options{})
	closed := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() { closed <- s.Close() })
	if err := s.Serve(l); stop() || err != nbd.ErrServerClosed {
		return err
	}
	return <-closed
}

// Result is what a load did, and cost.
type Result struct {
	Operations   int64   `json:"operations"`
	PerSecond    float64 `json:"per_second"`
	MiBPerSecond float64 `json:"mib_per_second"`
	MedianMicros float64 `json:"median_us"`
	P99Micros    float64 `json:"p99_us"`
	// ServerMicros is 0 without -pid.
	ServerMicros float64 `json:"server_us"`
	ClientMicros float64 `json:"client_us"`
}

// samples bounds the latencies that are kept, so that their memory does not
// grow with the server's speed.
const samples = 1 << 20

func (s settings) measure(ctx context.Context, addr, export string) (Result, error) {
	conns := make([]*client.Conn, max(s.connections, 1))
	for i := range conns {
		c, err := client.Dial(ctx, addr, client.Options{Export: export, Simple: true})
		if err != nil {
			return Result{}, err
		}
		defer c.Close()
		conns[i] = c
	}
	s.load.Span = min(s.load.Span, int64(conns[0].Export().Bytes))
	if s.fill {
		fill := client.Load{Depth: 4, Bytes: 1 << 20, Span: s.load.Span, Write: true, Sequential: true}
		if err := fill.Run(conns[0], int(s.load.Span>>20)); err != nil {
			return Result{}, err
		}
	}
	server, own, start := processCPU(s.pid), ownCPU(), time.Now()
	until := start.Add(s.time)
	var wg sync.WaitGroup
	parts := make([]part, len(conns))
	for i, c := range conns {
		wg.Go(func() { parts[i].run(ctx, c, s.load, uint64(i), until) })
	}
	wg.Wait()
	took := time.Since(start)
	server, own = processCPU(s.pid)-server, ownCPU()-own
	var all part
	for _, p := range parts {
		all.ops += p.ops
		all.took = append(all.took, p.took...)
		all.err = cmp.Or(all.err, p.err)
	}
	if all.err != nil || all.ops == 0 {
		return Result{}, cmp.Or(all.err, ctx.Err(), errors.New("nothing was done"))
	}
	slices.Sort(all.took)
	micros := func(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }
	r := Result{Operations: all.ops, PerSecond: float64(all.ops) / took.Seconds(),
		MedianMicros: micros(all.took[len(all.took)/2]), P99Micros: micros(all.took[len(all.took)*99/100]),
		ServerMicros: micros(server) / float64(all.ops), ClientMicros: micros(own) / float64(all.ops)}
	r.MiBPerSecond = r.PerSecond * float64(s.load.Bytes) / (1 << 20)
	return r, nil
}

// part is one connection's.
type part struct {
	ops  int64
	took []time.Duration
	err  error
}

func (p *part) run(ctx context.Context, c *client.Conn, l client.Load, seed uint64, until time.Time) {
	l.Now = time.Now
	l.Observe = func(d time.Duration) {
		if len(p.took) < samples {
			p.took = append(p.took, d)
		} else {
			p.took[p.ops%samples] = d
		}
		p.ops++
	}
	// A run ends with nothing in flight: it is long beside that.
	n := max(1000*l.Depth/max(1, l.Bytes>>14), 4*l.Depth)
	for round := uint64(0); p.err == nil && ctx.Err() == nil && time.Now().Before(until); round++ {
		l.Seed = seed<<32 + round
		p.err = l.Run(c, n)
	}
}

func ownCPU() time.Duration {
	var u syscall.Rusage
	// It cannot fail with these arguments.
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// processCPU is the processor time of a process so far, in ticks of 10 ms; 0 if
// there is none.
func processCPU(pid int) time.Duration {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	// After the name in parentheses: state is field 3, utime 14, stime 15.
	f := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(f) < 13 {
		return 0
	}
	var sum time.Duration
	for _, ticks := range f[11:13] {
		n, _ := strconv.ParseInt(ticks, 10, 64)
		sum += time.Duration(n) * 10 * time.Millisecond
	}
	return sum
}
