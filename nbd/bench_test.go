package nbd_test

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"firn.io/firn/nbd/client"
)

const loadSpan = 256 << 20

// BenchmarkServers measures servers with a gigabyte in memory, each in a process
// of its own, with the same client in this one: time per request, the server's
// CPU time per request, and the median time of a request at depth 1.
func BenchmarkServers(b *testing.B) {
	for _, network := range []string{"unix", "tcp"} {
		for _, server := range []struct {
			name string
			env  string
			args func(addr string) []string
		}{
			{"firn", "", nil},
			{"firn-workers", "FIRN_NBD_TEST_NO_LENDING=1", nil},
			{"nbdkit", "", nbdkitArgs},
		} {
			b.Run(network+"/"+server.name, func(b *testing.B) {
				addr, pid := startServer(b, network, server.env, server.args)
				benchServer(b, addr, pid)
			})
		}
	}
}

func nbdkitArgs(addr string) []string {
	args := []string{"nbdkit", "--foreground", "--exit-with-parent"}
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		args = append(args, "--unix", path)
	} else {
		host, port, _ := net.SplitHostPort(addr)
		args = append(args, "--ipaddr", host, "--port", port)
	}
	return append(args, "memory", "1G")
}

func startServer(b testing.TB, network, env string, args func(string) []string) (addr string, pid int) {
	addr = "unix:" + filepath.Join(shortDir(b), "s")
	if network == "tcp" {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			b.Fatal(err)
		}
		addr = l.Addr().String()
		l.Close()
	}
	argv := []string{os.Args[0]}
	if args != nil {
		argv = args(addr)
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), "FIRN_NBD_TEST_SERVER="+addr, env)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		b.Fatalf("%v (Debian package nbdkit)", err)
	}
	b.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	for deadline := time.Now().Add(2 * time.Minute); ; {
		c, err := client.Dial(b.Context(), addr, client.Options{})
		if err == nil {
			c.Close()
			return addr, cmd.Process.Pid
		}
		if time.Now().After(deadline) {
			b.Fatal(err)
		}
	}
}

func benchServer(b *testing.B, addr string, pid int) {
	c := dial(b, addr, client.Options{})
	fill := client.Load{Depth: 4, Bytes: 1 << 20, Span: loadSpan, Write: true, Sequential: true}
	if err := fill.Run(c, loadSpan>>20); err != nil {
		b.Fatal(err)
	}
	for _, l := range []client.Load{
		{Depth: 1, Bytes: 4 << 10},
		{Depth: 32, Bytes: 4 << 10},
		{Depth: 1, Bytes: 4 << 10, Write: true},
		{Depth: 32, Bytes: 4 << 10, Write: true},
		{Depth: 8, Bytes: 64 << 10},
		{Depth: 4, Bytes: 1 << 20, Sequential: true},
		{Depth: 4, Bytes: 1 << 20, Sequential: true, Write: true},
	} {
		l.Span = loadSpan
		op := "read"
		if l.Write {
			op = "write"
		}
		b.Run(fmt.Sprintf("%s/%dk/depth%d", op, l.Bytes>>10, l.Depth), func(b *testing.B) {
			b.SetBytes(int64(l.Bytes))
			var took []time.Duration
			if l.Depth == 1 {
				l.Now, l.Observe = time.Now, func(d time.Duration) { took = append(took, d) }
			}
			before := cpuOf(b, pid)
			if err := l.Run(c, b.N); err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64((cpuOf(b, pid)-before).Nanoseconds())/float64(b.N)/1e3, "server-us/op")
			if len(took) > 0 {
				slices.Sort(took)
				b.ReportMetric(float64(took[len(took)/2].Nanoseconds())/1e3, "median-us")
			}
		})
	}
}

// cpuOf returns the CPU time of all threads of a process.
func cpuOf(b *testing.B, pid int) (sum time.Duration) {
	stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil {
		b.Fatal(err)
	}
	for _, path := range stats {
		f, err := os.Open(path)
		if err != nil {
			continue
		}
		sc := bufio.NewScanner(f)
		sc.Scan()
		ns, _ := strconv.ParseInt(strings.Fields(sc.Text() + " 0")[0], 10, 64)
		sum += time.Duration(ns)
		f.Close()
	}
	return sum
}
