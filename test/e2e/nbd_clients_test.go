package e2e

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"firn.io/firn/nbd/client"
	"firn.io/firn/nbd/wire"
)

// TestNBDClientList: the reference client's list.
func TestNBDClientList(t *testing.T) {
	t.Parallel()
	s := up(t, t.TempDir(), "--volume", "one=64M", "--volume", "two=64M")
	host, port, _ := strings.Cut(s.NBD, ":")
	list := run(t, "nbd-client", "-l", host, port)
	if !strings.Contains(list, "\none") || !strings.Contains(list, "\ntwo") {
		t.Errorf("listed %s", list)
	}
}

// TestNbdcopySparse: an image with holes goes in and out with its holes, over
// many connections, and zeroes are not written where none are needed.
func TestNbdcopySparse(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	image(t, dir+"/part.img", 24<<20, 3)
	run(t, "truncate", "-s", "256M", dir+"/in.img")
	for _, at := range []string{"0", "100", "231"} {
		run(t, "dd", "if="+dir+"/part.img", "of="+dir+"/in.img", "bs=1M", "seek="+at, "conv=notrunc", "status=none")
	}
	s := up(t, dir+"/data", "--volume", "v=256M")
	for _, flags := range [][]string{{"--connections=8", "--requests=64"}, {"--destination-is-zero"}, {"--allocated", "--connections=1"}, {"--synchronous"}} {
		if flags[0] == "--destination-is-zero" {
			libnbd(t, s.uri("v"), "h.trim(h.get_size(), 0)")
		}
		run(t, "nbdcopy", append(flags, dir+"/in.img", s.uri("v"))...)
		run(t, "nbdcopy", append(flags, s.uri("v"), dir+"/out.img")...)
		run(t, "cmp", dir+"/in.img", dir+"/out.img")
		if flags[0] != "--allocated" {
			if blocks := allocated(t, dir+"/out.img"); blocks > 160<<20 {
				t.Errorf("%s: %d MiB of an image with 72 MiB of data are allocated", flags[0], blocks>>20)
			}
		}
		if err := os.Remove(dir + "/out.img"); err != nil {
			t.Fatal(err)
		}
	}
}

func allocated(t *testing.T, path string) int64 {
	t.Helper()
	n, err := strconv.ParseInt(strings.TrimSpace(run(t, "stat", "-c", "%b", path)), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n * 512
}

// TestNbdkitFilters: nbdkit's client in front of us, with filters that split,
// delay and lose requests between.
func TestNbdkitFilters(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	const n = 48 << 20
	image(t, dir+"/in.img", n, 9)
	s := up(t, dir+"/data", "--volume", "v=48M")
	for _, c := range []struct {
		name  string
		flags []string
	}{
		{"blocksize", []string{"--filter=blocksize", "minblock=512", "maxdata=64k", "maxlen=1M"}},
		{"delay", []string{"--filter=delay", "rdelay=1ms", "wdelay=1ms"}},
		{"retried errors", []string{"--filter=retry-request", "--filter=error", "error-rate=1%", "retry-request-retries=9", "retry-request-delay=1"}},
		{"readahead and stats", []string{"--filter=stats", "--filter=readahead", "statsfile=" + dir + "/stats"}},
		{"several connections", []string{"--filter=multi-conn", "multi-conn-mode=emulate"}},
	} {
		args := append([]string{"-U", "-", "nbd", "hostname=127.0.0.1", "port=" + s.NBD[strings.LastIndex(s.NBD, ":")+1:], "export=v"}, c.flags...)
		out := dir + "/" + strings.ReplaceAll(c.name, " ", "-")
		run(t, "nbdkit", append(args, "--run", fmt.Sprintf("nbdcopy %s/in.img $uri && nbdcopy $uri %s && cmp %s/in.img %s", dir, out, dir, out))...)
		run(t, "nbdcopy", s.uri("v"), out)
		run(t, "cmp", dir+"/in.img", out)
	}
}

// TestQemuBench: QEMU's own load, with flushes between, and what it left.
func TestQemuBench(t *testing.T) {
	t.Parallel()
	s := up(t, t.TempDir(), "--volume", "v=256M")
	for _, args := range [][]string{
		{"-w", "-c", "5000", "-d", "32", "-s", "4096", "--flush-interval=500", "--pattern=165"},
		{"-c", "5000", "-d", "32", "-s", "4096"},
		{"-w", "-c", "100", "-d", "8", "-s", "1048576", "--no-drain", "--flush-interval=10", "--pattern=90"},
	} {
		out := run(t, "qemu-img", append(append([]string{"bench", "-f", "raw"}, args...), s.uri("v"))...)
		measured(t, "qemu-img bench %s: %s", strings.Join(args, " "), strings.TrimSpace(out[strings.LastIndex(strings.TrimSpace(out), "\n")+1:]))
	}
	run(t, "qemu-io", "-f", "raw", "-c", "read -P 90 0 100M", s.uri("v"))
}

// TestNBDIllegalRequests: what libnbd would not send by itself is answered by
// an error of the protocol, on a connection that goes on, and changes nothing.
func TestNBDIllegalRequests(t *testing.T) {
	t.Parallel()
	s := up(t, t.TempDir(), "--volume", "v=64M")
	libnbd(t, s.uri("v"), `
import errno
h.pwrite(b"k" * 4096, 4096)
h.set_strict_mode(0)
size = h.get_size()
I, S = errno.EINVAL, errno.ENOSPC
x = b"x" * 512
illegal = [
  (I, lambda: h.pread(512, size)), (I, lambda: h.pread(1024, size - 512)), (I, lambda: h.pread(512, (1 << 63) - 1)),
  (S, lambda: h.pwrite(x, size)), (S, lambda: h.pwrite(x * 2, size - 512)), (S, lambda: h.pwrite(x, 1 << 62)),
  (I, lambda: h.trim(4096, size - 1)), (S, lambda: h.zero(4096, size - 1)), (I, lambda: h.cache(4096, size - 1)),
  (I, lambda: h.trim(0xffffffff, 4096)), (S, lambda: h.zero(0xffffffff, 4096)),
  (I, lambda: h.pread(512, 0, nbd.CMD_FLAG_NO_HOLE)), (I, lambda: h.pread(512, 0, nbd.CMD_FLAG_REQ_ONE)), (I, lambda: h.pread(512, 0, nbd.CMD_FLAG_FAST_ZERO)),
  (I, lambda: h.pwrite(x, 0, nbd.CMD_FLAG_DF)), (I, lambda: h.pwrite(x, 0, nbd.CMD_FLAG_NO_HOLE)), (I, lambda: h.pwrite(x, 0, 0x8000)),
  (I, lambda: h.trim(512, 0, nbd.CMD_FLAG_FAST_ZERO)), (I, lambda: h.zero(512, 0, nbd.CMD_FLAG_REQ_ONE)), (I, lambda: h.cache(512, 0, nbd.CMD_FLAG_DF)),
  (I, lambda: h.flush(nbd.CMD_FLAG_NO_HOLE)), (I, lambda: h.pread(512, 0, 0x4000)), (I, lambda: h.block_status(0, 0, lambda *a: 0)), (I, lambda: h.block_status(4096, size, lambda *a: 0)),
]
for i, (want, f) in enumerate(illegal):
    try:
        f()
    except nbd.Error as e:
        assert e.errnum == want, (i, e.errno, e.string)
    else:
        assert False, (i, "succeeded")
# What is odd but allowed.
h.pread(512, 0, nbd.CMD_FLAG_FUA); h.flush(nbd.CMD_FLAG_FUA); h.trim(0, 0); h.zero(0, 0); h.pwrite(b"", size); h.cache(0, size)
assert h.pread(4096, 4096) == b"k" * 4096
assert h.pread(4096, 0) == b"\0" * 4096
`)
}

// TestNBDHostileReaders: clients that ask for more than they read harm
// themselves: the gateway's memory stays bounded, and others are served.
func TestNBDHostileReaders(t *testing.T) {
	t.Parallel()
	const hostile = 60
	s := up(t, t.TempDir(), "--volume", "v=128M")
	good, err := client.Dial(t.Context(), s.NBD, client.Options{Export: "v"})
	if err != nil {
		t.Fatal(err)
	}
	defer good.Close()
	fill := client.Load{Depth: 4, Bytes: 1 << 20, Span: 128 << 20, Write: true, Sequential: true}
	if err := fill.Run(good, 128); err != nil {
		t.Fatal(err)
	}
	before := residentPeak(t, s.cmd.Process.Pid)
	var wg sync.WaitGroup
	for i := range hostile {
		nc, _, err := client.Enter(t.Context(), s.NBD, client.Options{Export: "v"})
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		wg.Go(func() { askForever(nc, uint64(i%4)<<25) })
	}
	wg.Wait()
	begin := time.Now()
	read := client.Load{Depth: 8, Bytes: 64 << 10, Span: 128 << 20}
	if err := read.Run(good, 500); err != nil {
		t.Fatal(err)
	}
	grown := residentPeak(t, s.cmd.Process.Pid) - before
	measured(t, "%d hostile readers: %d MiB more than before, 500 reads of 64 KiB beside them in %v", hostile, grown>>20, time.Since(begin).Round(time.Millisecond))
	if limit := int64(hostile*4+160) << 20; grown > limit {
		t.Errorf("the server has grown by %d MiB, at most %d are meant", grown>>20, limit>>20)
	}
}

// askForever asks for 32 MiB at off, again and again, until the server has
// taken nothing for a while. It never reads.
func askForever(nc net.Conn, off uint64) {
	var all []byte
	for range 64 {
		all = wire.AppendRequest(all, wire.SimpleReplies, wire.Request{Command: wire.CmdRead, Offset: off, Length: 32 << 20})
	}
	for range 1000 {
		nc.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
		if _, err := nc.Write(all); err != nil {
			return
		}
	}
}

// residentPeak returns the largest resident memory that a process has had.
func residentPeak(t *testing.T, pid int) int64 {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "VmHWM:")
	kib, _, _ := strings.Cut(rest, "kB")
	n, err := strconv.ParseInt(strings.TrimSpace(kib), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n << 10
}

// TestNBDBlockSizes: a volume with blocks of 4096 says so, to clients that ask.
func TestNBDBlockSizes(t *testing.T) {
	t.Parallel()
	s := up(t, t.TempDir(), "--volume", "small=64M")
	s.firn("volume", "create", "large", "64M", "--block-size", "4096")
	for volume, want := range map[string]string{"small": `"block_size_minimum": 1,`, "large": `"block_size_minimum": 4096,`} {
		if got := run(t, "nbdinfo", "--json", s.uri(volume)); !strings.Contains(got, want) || !strings.Contains(got, `"block_size_preferred": 4096,`) {
			t.Errorf("%s: %s", volume, got)
		}
	}
	run(t, "qemu-io", "-f", "raw", "-c", "write -P 3 4096 8192", "-c", "read -P 3 8192 4096", "-c", "write -P 4 4608 512", "-c", "read -P 4 4608 512", "-c", "read -P 3 4096 512", s.uri("large"))
}
