package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// server is one thing to measure.
type server struct {
	name     string
	replicas int // of Firn
	start    func(ctx context.Context, dir string) (*running, error)
}

// running is a started server with its process group.
type running struct {
	cmd     *exec.Cmd
	uri     string
	nbd     string // host:port that answers when it is ready
	metrics string // URL, or empty
	ready   string // URL that answers 200 when the volume can be used, or empty
	firn    string // the program, of a server that is Firn
	api     string // its host:port
	log     *bytes.Buffer
	exited  chan struct{} // closed when the process has ended
}

func servers(firn string) []server {
	up := func(args ...string) func(context.Context, string) (*running, error) {
		return func(ctx context.Context, dir string) (*running, error) { return startFirn(ctx, firn, dir, args...) }
	}
	return []server{
		{"nbdkit memory", 0, startNbdkit},
		{"qemu-nbd file, cached", 0, startQemu("writeback")},
		{"qemu-nbd file, durable", 0, startQemu("directsync")},
		{"firn 1 replica", 1, up("--nodes", "1")},
		{"firn 3 replicas, in process", 3, up("--nodes", "3")},
		{"firn 3 replicas, gRPC", 3, up("--nodes", "3", "--wire")},
	}
}

func freePorts(n int) ([]int, error) {
	var ports []int
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close()
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	return ports, nil
}

func startNbdkit(ctx context.Context, dir string) (*running, error) {
	p, err := freePorts(1)
	if err != nil {
		return nil, err
	}
	return launch(ctx, p[0], "", exec.CommandContext(ctx, "nbdkit", "--foreground", "--port", strconv.Itoa(p[0]), "--ipaddr", "127.0.0.1",
		"memory", "size="+strconv.Itoa(volumeBytes)))
}

func startQemu(cache string) func(context.Context, string) (*running, error) {
	return func(ctx context.Context, dir string) (*running, error) {
		p, err := freePorts(1)
		if err != nil {
			return nil, err
		}
		image := filepath.Join(dir, "disk.raw")
		f, err := os.Create(image)
		if err != nil {
			return nil, err
		}
		if err := f.Truncate(volumeBytes); err != nil {
			return nil, err
		}
		if err := f.Close(); err != nil {
			return nil, err
		}
		return launch(ctx, p[0], "", exec.CommandContext(ctx, "qemu-nbd", "--persistent", "--shared=8", "--format=raw", "--cache="+cache,
			"--bind=127.0.0.1", "--port="+strconv.Itoa(p[0]), image))
	}
}

func startFirn(ctx context.Context, firn, dir string, args ...string) (*running, error) {
	p, err := freePorts(3)
	if err != nil {
		return nil, err
	}
	at := func(i int) string { return "127.0.0.1:" + strconv.Itoa(p[i]) }
	cmd := exec.CommandContext(ctx, firn, append([]string{"up", "--data", dir, "--nbd", at(0), "--api", at(1), "--http", at(2),
		"--volume", fmt.Sprintf("bench=%dM", volumeBytes>>20)}, args...)...)
	r, err := launch(ctx, p[0], "bench", cmd)
	if err != nil {
		return nil, err
	}
	r.firn, r.api = firn, at(1)
	r.metrics, r.ready = "http://"+at(2)+"/metrics", "http://"+at(2)+"/readyz"
	return r, nil
}

func launch(ctx context.Context, port int, export string, cmd *exec.Cmd) (*running, error) {
	r := &running{cmd: cmd, nbd: "127.0.0.1:" + strconv.Itoa(port), log: &bytes.Buffer{}, exited: make(chan struct{})}
	r.uri = "nbd://" + r.nbd + "/" + export
	cmd.Stdout, cmd.Stderr = r.log, r.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	go func() { cmd.Wait(); close(r.exited) }()
	return r, nil
}

// waitReady dials until the server answers, at most a minute.
func (r *running) waitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if r.answers(ctx) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not ready: %w\n%s", ctx.Err(), r.log)
		case <-r.exited:
			return r.died()
		case <-tick.C:
		}
	}
}

func (r *running) answers(ctx context.Context) bool {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", r.nbd)
	if err != nil {
		return false
	}
	c.Close()
	if r.ready == "" {
		return true
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.ready, nil)
	if err != nil {
		return false
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// died returns what the server said if it has ended.
func (r *running) died() error {
	select {
	case <-r.exited:
		return fmt.Errorf("the server ended: %s", r.log)
	default:
		return nil
	}
}

func (r *running) stop() {
	syscall.Kill(-r.cmd.Process.Pid, syscall.SIGTERM)
	select {
	case <-r.exited:
	case <-time.After(20 * time.Second):
		syscall.Kill(-r.cmd.Process.Pid, syscall.SIGKILL)
		<-r.exited
	}
}

// usage is what a server has used so far.
type usage struct {
	counters
	cpu time.Duration
}

func (r *running) usage(ctx context.Context) (u usage, err error) {
	if u.counters, err = r.counters(ctx); err == nil {
		u.cpu, err = processTime(r.cmd.Process.Pid)
	}
	return u, err
}

// processTime is the processor time of a process so far (threads and reaped
// children included), in clock ticks of 10 ms.
func processTime(pid int) (time.Duration, error) {
	path := fmt.Sprintf("/proc/%d/stat", pid)
	stat, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	// The fields after the last ')': state is field 3, utime field 14, stime 15.
	f := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(f) < 13 {
		return 0, fmt.Errorf("%s has %d fields", path, len(f))
	}
	var ticks int64
	for _, s := range f[11:13] {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", path, err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond, nil
}

// counters are read from /metrics, summed over a process's disks.
type counters struct {
	// measured: the server has counters, and they were read.
	measured bool
	// batches, moved and zeroed are bytes that logs wrote: entries with all
	// headers, survivors of collection, spare segments ahead of their use.
	batches, moved, zeroed float64
	index, syncs, mallocs  float64
	// pending is a level: updates that are in no checkpoint.
	pending float64
}

func (c counters) minus(o counters) counters {
	return counters{measured: c.measured && o.measured, batches: c.batches - o.batches, moved: c.moved - o.moved, zeroed: c.zeroed - o.zeroed,
		index: c.index - o.index, syncs: c.syncs - o.syncs, mallocs: c.mallocs - o.mallocs, pending: c.pending}
}

// settleTime bounds the wait for a checkpoint; one is due when the oldest change
// is a minute old.
const settleTime = 2 * time.Minute

// settled returns the counters, empty for other servers than Firn, once checkpoints
// hold all that was written, so that what the index writes for a job is counted to
// that job.
func (r *running) settled(ctx context.Context) (counters, error) {
	ctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		c, err := r.counters(ctx)
		if err != nil || c.pending == 0 {
			return c, err
		}
		select {
		case <-ctx.Done():
			return c, fmt.Errorf("%.0f updates are in no checkpoint after %v: %w", c.pending, settleTime, ctx.Err())
		case <-tick.C:
		}
	}
}

// counters asks a server for its counters; a server without any has none measured.
// An answer that lacks one of them is an error: zeros would be taken for a result.
func (r *running) counters(ctx context.Context) (counters, error) {
	if r.metrics == "" {
		return counters{}, nil
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.metrics, nil)
	if err != nil {
		return counters{}, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return counters{}, fmt.Errorf("read the server's counters: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return counters{}, fmt.Errorf("read the server's counters: %s says %s", r.metrics, resp.Status)
	}
	c, err := parseCounters(io.LimitReader(resp.Body, 16<<20))
	if err != nil {
		return c, fmt.Errorf("%s: %w", r.metrics, err)
	}
	return c, nil
}

func parseCounters(text io.Reader) (counters, error) {
	c := counters{measured: true}
	wanted := []struct {
		name, label string
		sum         *float64
		found       bool
	}{
		{"firn_disk_log_written_bytes_total", `what="batch"`, &c.batches, false},
		{"firn_disk_log_written_bytes_total", `what="moved"`, &c.moved, false},
		{"firn_disk_log_written_bytes_total", `what="zeroed"`, &c.zeroed, false},
		{"firn_disk_pending_updates", "", &c.pending, false},
		{"firn_disk_written_bytes_total", `class="index"`, &c.index, false},
		{"go_memstats_mallocs_total", "", &c.mallocs, false},
		{"firn_disk_syncs_total", "", &c.syncs, false},
	}
	lines := bufio.NewScanner(text)
	for lines.Scan() {
		series, value, ok := strings.Cut(lines.Text(), " ")
		v, err := strconv.ParseFloat(value, 64)
		if !ok || err != nil {
			continue
		}
		name, labels, _ := strings.Cut(series, "{")
		for i := range wanted {
			if w := &wanted[i]; name == w.name && strings.Contains(labels, w.label) {
				*w.sum, w.found = *w.sum+v, true
			}
		}
	}
	if err := lines.Err(); err != nil {
		return counters{}, fmt.Errorf("read the counters: %w", err)
	}
	for _, w := range wanted {
		if !w.found {
			return counters{}, fmt.Errorf("there is no counter %s{%s}", w.name, w.label)
		}
	}
	return c, nil
}
