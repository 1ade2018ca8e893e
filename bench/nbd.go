package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// loadJob is one load of test/nbdload.
type loadJob struct {
	name  string
	flags []string
}

var loadJobs = []loadJob{
	{"4 KiB random read, 1 in flight", []string{"-depth", "1"}},
	{"4 KiB random read, 32 in flight", []string{"-depth", "32"}},
	{"4 KiB random read, 4 connections of 32", []string{"-depth", "32", "-connections", "4"}},
	{"4 KiB random write, 32 in flight", []string{"-depth", "32", "-write"}},
	{"1 MiB sequential read, 4 in flight", []string{"-depth", "4", "-bytes", "1048576", "-sequential"}},
	{"1 MiB sequential write, 4 in flight", []string{"-depth", "4", "-bytes", "1048576", "-sequential", "-write"}},
}

// loadResult is what nbdload prints.
type loadResult struct {
	PerSecond    float64 `json:"per_second"`
	MiBPerSecond float64 `json:"mib_per_second"`
	MedianMicros float64 `json:"median_us"`
	P99Micros    float64 `json:"p99_us"`
	ServerMicros float64 `json:"server_us"`
	ClientMicros float64 `json:"client_us"`
}

// nbdServers are servers of memory, or of nothing, over a unix socket: what is
// measured is the protocol and not a store.
func nbdServers(nbdload, image string) []struct {
	name string
	args func(socket string) []string
} {
	return []struct {
		name string
		args func(socket string) []string
	}{
		{"firn memory device", func(s string) []string { return []string{nbdload, "-serve", "unix:" + s} }},
		{"firn memory device, by workers", func(s string) []string { return []string{nbdload, "-no-lending", "-serve", "unix:" + s} }},
		{"nbdkit memory", func(s string) []string { return []string{"nbdkit", "--foreground", "--unix", s, "memory", "1G"} }},
		{"qemu-nbd null-co", func(s string) []string {
			return []string{"qemu-nbd", "--persistent", "--shared=8", "--socket=" + s, "--image-opts", "driver=null-co,size=1G,read-zeroes=on"}
		}},
		{"qemu-nbd file", func(s string) []string {
			return []string{"qemu-nbd", "--persistent", "--shared=8", "--socket=" + s, "--format=raw", "--cache=writeback", image}
		}},
	}
}

// measureNBD compares NBD servers by a client that is not the bottleneck, and
// returns the lines of the report.
func measureNBD(ctx context.Context, o options, dir string) (lines []string, err error) {
	nbdload, image := filepath.Join(dir, "nbdload"), filepath.Join(dir, "nbd.raw")
	if out, err := exec.CommandContext(ctx, "go", "build", "-o", nbdload, "./test/nbdload").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build of nbdload: %w\n%s", err, out)
	}
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		return nil, err
	}
	if err := os.Truncate(image, volumeBytes); err != nil {
		return nil, err
	}
	results := map[string][]loadResult{}
	servers := nbdServers(nbdload, image)
	for i, s := range servers {
		if !strings.Contains(s.name, o.only) {
			continue
		}
		socket := filepath.Join(dir, "nbd"+strconv.Itoa(i))
		if results[s.name], err = loadServer(ctx, nbdload, socket, s.args(socket), o.each); err != nil {
			return nil, fmt.Errorf("%s: %w", s.name, err)
		}
	}
	for i, j := range loadJobs {
		lines = append(lines, "", "### NBD servers of memory: "+j.name, "",
			"| server | op/s | MiB/s | median | p99 | server CPU/op | client CPU/op |", "|---|---|---|---|---|---|---|")
		for _, s := range servers {
			if r := results[s.name]; r != nil {
				lines = append(lines, fmt.Sprintf("| %s | %.0f | %.0f | %.0f us | %.0f us | %.2f us | %.2f us |", s.name,
					r[i].PerSecond, r[i].MiBPerSecond, r[i].MedianMicros, r[i].P99Micros, r[i].ServerMicros, r[i].ClientMicros))
			}
		}
	}
	return lines, nil
}

// loadServer starts a server and runs all jobs on it.
func loadServer(ctx context.Context, nbdload, socket string, args []string, each time.Duration) ([]loadResult, error) {
	ctx, stop := context.WithCancel(ctx)
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		stop()
		return nil, err
	}
	defer cmd.Wait()
	defer stop()
	load := func(flags ...string) (r loadResult, err error) {
		flags = append([]string{"-json", "-pid", strconv.Itoa(cmd.Process.Pid)}, flags...)
		out, err := exec.CommandContext(ctx, nbdload, append(flags, "unix:"+socket)...).Output()
		if err == nil {
			err = json.Unmarshal(out, &r)
		}
		return r, err
	}
	// The fill waits for the server to listen, too.
	ready := false
	for deadline := time.Now().Add(20 * time.Second); !ready && time.Now().Before(deadline); {
		_, err := load("-fill", "-time", "100ms")
		ready = err == nil
	}
	if !ready {
		return nil, fmt.Errorf("%s does not answer", strings.Join(args, " "))
	}
	var results []loadResult
	for _, j := range loadJobs {
		r, err := load(append([]string{"-time", each.String()}, j.flags...)...)
		if err != nil {
			return nil, fmt.Errorf("job %q: %w", j.name, err)
		}
		fmt.Fprintf(os.Stderr, "%-34s %-38s %9.0f op/s  server %.2f us/op, client %.2f us/op\n", filepath.Base(args[0]), j.name, r.PerSecond, r.ServerMicros, r.ClientMicros)
		results = append(results, r)
	}
	return results, nil
}
