package nbd_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/block/blocktest"
	"firn.io/firn/nbd"
	"firn.io/firn/nbd/wire"
)

// debian names the packages of the clients that these tests run: software that
// we did not write is what says whether we speak the protocol.
var debian = map[string]string{
	"nbdinfo": "libnbd-bin", "nbdcopy": "libnbd-bin", "/usr/bin/python3": "python3-libnbd",
	"qemu-img": "qemu-utils", "qemu-io": "qemu-utils", "fio": "fio", "nbdkit": "nbdkit",
}

// run runs a client and returns what it printed; a missing one fails the test.
func run(t testing.TB, tool string, args ...string) string {
	t.Helper()
	out, err := command(t, tool, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", tool, strings.Join(args, " "), err, out)
	}
	return out
}

func command(t testing.TB, tool string, args ...string) (string, error) {
	t.Helper()
	path, err := exec.LookPath(tool)
	if err != nil {
		t.Fatalf("%s is missing: install the Debian package %s", tool, debian[tool])
	}
	cmd := exec.CommandContext(t.Context(), path, args...)
	cmd.Dir = t.TempDir()
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// both runs a test over TCP and over a unix socket.
func both(t *testing.T, o blocktest.Options, f func(t *testing.T, d *blocktest.Device, uri string)) {
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			t.Parallel()
			d, exports := newVolume(o)
			addr := "127.0.0.1:0"
			if network == "unix" {
				addr = "unix:" + filepath.Join(shortDir(t), "s")
			}
			l, err := nbd.Listen(t.Context(), addr)
			if err != nil {
				t.Fatal(err)
			}
			serveOn(t, l, exports, nbd.Options{})
			f(t, d, nbd.URI(l.Addr(), "vol"))
		})
	}
}

func TestNbdinfo(t *testing.T) {
	both(t, blocktest.Options{}, func(t *testing.T, d *blocktest.Device, uri string) {
		if err := d.WriteAt(t.Context(), make([]byte, 1<<20), 4<<20, 0); err != nil {
			t.Fatal(err)
		}
		var info struct {
			Protocol string
			Exports  []map[string]any
		}
		if err := json.Unmarshal([]byte(run(t, "nbdinfo", "--json", uri)), &info); err != nil {
			t.Fatal(err)
		}
		e := info.Exports[0]
		for key, want := range map[string]any{"export-name": "vol", "export-size": float64(volBytes), "is_read_only": false, "can_cache": true,
			"can_df": true, "can_fast_zero": true, "can_flush": true, "can_fua": true, "can_multi_conn": true, "can_trim": true, "can_zero": true,
			"block_size_minimum": float64(1), "block_size_preferred": float64(4096), "block_size_maximum": float64(32 << 20), "is_rotational": false} {
			if e[key] != want {
				t.Errorf("%s is %v, want %v", key, e[key], want)
			}
		}
		if fmt.Sprint(e["contexts"]) != "[base:allocation]" {
			t.Errorf("contexts %v", e["contexts"])
		}
		var extents []struct{ Offset, Length, Type int64 }
		if err := json.Unmarshal([]byte(run(t, "nbdinfo", "--map", "--json", uri)), &extents); err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprint(extents); got != fmt.Sprintf("[{0 %d 3} {%d %d 0} {%d %d 3}]", 4<<20, 4<<20, 1<<20, 5<<20, volBytes-5<<20) {
			t.Errorf("map %s", got)
		}
	})
}

func TestNbdinfoList(t *testing.T) {
	addr, _ := serve(t, newCatalog("a", "b", "c"), nbd.Options{})
	out := run(t, "nbdinfo", "--list", "nbd+unix:///?socket="+url.QueryEscape(strings.TrimPrefix(addr, "unix:")))
	for _, want := range []string{`export="a"`, `export="b"`, `export="c"`, "export-size: 3145728"} {
		if !strings.Contains(out, want) {
			t.Errorf("list lacks %s:\n%s", want, out)
		}
	}
	out, err := command(t, "nbdinfo", nbd.URI(&net.UnixAddr{Net: "unix", Name: strings.TrimPrefix(addr, "unix:")}, "none"))
	if err == nil || !strings.Contains(out, "No such file or directory for export: none") {
		t.Errorf("unknown export: %v\n%s", err, out)
	}
}

// image writes a file of n bytes with data, zeros and holes.
func image(t *testing.T, n int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "img")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(n); err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	p := make([]byte, 100_000)
	for off := int64(0); off+int64(len(p)) < n; off += 1_234_567 {
		for i := range p {
			p[i] = byte(rnd.Uint32())
		}
		clear(p[40_000:50_000])
		if _, err := f.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

func same(t *testing.T, a, b string) {
	t.Helper()
	x, err := os.ReadFile(a)
	if err != nil {
		t.Fatal(err)
	}
	y, err := os.ReadFile(b)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(x, y) {
		t.Errorf("%s and %s differ", a, b)
	}
}

func TestNbdcopy(t *testing.T) {
	both(t, blocktest.Options{}, func(t *testing.T, d *blocktest.Device, uri string) {
		img := image(t, volBytes)
		out := filepath.Join(t.TempDir(), "out")
		run(t, "nbdcopy", "--connections=4", "--requests=64", "--flush", img, uri)
		if d.Flushes() == 0 {
			t.Errorf("not flushed")
		}
		run(t, "nbdcopy", "--connections=4", "--requests=64", uri, out)
		same(t, img, out)
		run(t, "nbdcopy", "--request-size=33554432", "--synchronous", uri, out)
		same(t, img, out)
		run(t, "nbdcopy", "--allocated", img, uri)
		run(t, "nbdcopy", "--no-extents", uri, out)
		same(t, img, out)
		if err := d.Trim(t.Context(), 0, volBytes, 0); err != nil {
			t.Fatal(err)
		}
		run(t, "nbdcopy", "--destination-is-zero", img, uri)
		run(t, "nbdcopy", uri, out)
		same(t, img, out)
	})
}

func TestQemu(t *testing.T) {
	both(t, blocktest.Options{}, func(t *testing.T, d *blocktest.Device, uri string) {
		img := image(t, volBytes)
		out := filepath.Join(t.TempDir(), "out")
		run(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", img, uri)
		run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", img, uri)
		run(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", uri, out)
		same(t, img, out)
		if got := run(t, "qemu-io", "-f", "raw", "-c", "write -P 0xab 0 1M", "-c", "write -z 512k 64k", "-c", "discard 0 64k", "-c", "read -P 0 0 64k",
			"-c", "read -P 0xab 64k 448k", "-c", "read -P 0 512k 64k", "-c", "read -P 0xab 576k 448k", "-c", "write -P 0xcd -f 1M 512",
			"-c", "read -P 0xcd 1M 512", "-c", "aio_write -P 7 2M 3M", "-c", "aio_flush", "-c", "read -P 7 2M 3M", "-c", "flush", uri); strings.Contains(got, "failed") {
			t.Errorf("qemu-io:\n%s", got)
		}
		if got, err := command(t, "qemu-io", "-f", "raw", "-c", "read -P 1 0 64k", uri); err == nil || !strings.Contains(got, "Pattern verification failed") {
			t.Errorf("qemu-io does not notice wrong bytes:\n%s", got)
		}
		if err := d.Trim(t.Context(), 8<<20, volBytes-8<<20, 0); err != nil {
			t.Fatal(err)
		}
		var extents []struct {
			Start, Length int64
			Zero, Data    bool
		}
		if err := json.Unmarshal([]byte(run(t, "qemu-img", "map", "--output=json", "-f", "raw", uri)), &extents); err != nil {
			t.Fatal(err)
		}
		first, last := extents[0], extents[len(extents)-1]
		if first.Data || first.Length != 64<<10 || last.Start > 8<<20 || last.Start+last.Length != volBytes || last.Data || !last.Zero {
			t.Errorf("map %+v", extents)
		}
		run(t, "qemu-img", "bench", "-f", "raw", "-c", "2000", "-d", "32", "-s", "4096", "-w", "--flush-interval=200", uri)
	})
}

func TestFio(t *testing.T) {
	both(t, blocktest.Options{}, func(t *testing.T, _ *blocktest.Device, uri string) {
		run(t, "fio", "--name=v", "--ioengine=nbd", "--uri="+uri, "--rw=randrw", "--bs=512-64k", "--bsrange=512-64k", "--iodepth=16", "--size=16m",
			"--verify=crc32c", "--verify_fatal=1", "--offset_increment=16m", "--numjobs=3", "--thread=1", "--trim_percentage=0", "--fsync=50")
		run(t, "fio", "--name=t", "--ioengine=nbd", "--uri="+uri, "--rw=randtrim", "--bs=64k", "--iodepth=8", "--size=16m")
	})
}

// TestNbdkitProxy: nbdkit's own client in front of us, with its filters between.
func TestNbdkitProxy(t *testing.T) {
	both(t, blocktest.Options{}, func(t *testing.T, _ *blocktest.Device, uri string) {
		img := image(t, volBytes)
		out := filepath.Join(t.TempDir(), "out")
		run(t, "nbdkit", "--unix", "-", "nbd", "uri="+uri, "--run", fmt.Sprintf("nbdcopy %s $uri && nbdcopy $uri %s", img, out))
		same(t, img, out)
	})
}

// TestLibnbdIllegal sends requests that libnbd would not let out, with its
// checks switched off, and expects an error of the protocol for each and a
// connection that goes on.
func TestLibnbdIllegal(t *testing.T) {
	both(t, blocktest.Options{}, func(t *testing.T, d *blocktest.Device, uri string) {
		out := run(t, "/usr/bin/python3", "-c", libnbdScript, uri)
		if strings.TrimSpace(out) != "done" {
			t.Errorf("%s", out)
		}
		if e, err := d.Extents(t.Context(), nil, 0, volBytes, 1); err != nil || e[0].State != block.Hole || e[0].Bytes != volBytes {
			t.Errorf("the volume was changed: %v %v", e, err)
		}
	})
}

const libnbdScript = `
import errno, nbd, sys
uri = sys.argv[1]

def expect(want, what, f, *args, **kw):
    try:
        f(*args, **kw)
    except nbd.Error as e:
        if e.errnum != want:
            print(what, "failed with", e.errno, e.string)
        return
    print(what, "succeeded")

for structured in (True, False):
    h = nbd.NBD()
    h.set_request_structured_replies(structured)
    if structured:
        h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.connect_uri(uri)
    h.set_strict_mode(0)
    size = h.get_size()
    E, S = errno.EINVAL, errno.ENOSPC
    expect(E, "read at end", h.pread, 512, size)
    expect(E, "read over end", h.pread, 1024, size - 512)
    expect(E, "read far out", h.pread, 512, 1 << 62)
    expect(S, "write at end", h.pwrite, b"x" * 512, size)
    expect(S, "write over end", h.pwrite, b"x" * 1024, size - 512)
    expect(E, "trim over end", h.trim, 4096, size - 1)
    expect(S, "zero over end", h.zero, 4096, size - 1)
    expect(E, "cache over end", h.cache, 4096, size - 1)
    expect(E, "read flag", h.pread, 512, 0, nbd.CMD_FLAG_REQ_ONE)
    expect(E, "write flag", h.pwrite, b"x" * 512, 0, nbd.CMD_FLAG_DF)
    expect(E, "trim flag", h.trim, 512, 0, nbd.CMD_FLAG_NO_HOLE)
    expect(E, "flush flag", h.flush, nbd.CMD_FLAG_DF)
    expect(E, "unknown flag", h.pread, 512, 0, 1 << 14)
    if not structured:
        expect(E, "DF with simple replies", h.pread, 512, 0, nbd.CMD_FLAG_DF)
    h.trim(0, 0)
    h.zero(0, 0)
    h.pwrite(b"", 0)
    h.pread(512, 0, nbd.CMD_FLAG_FUA)
    h.flush(nbd.CMD_FLAG_FUA)
    if structured:
        expect(E, "status of nothing", h.block_status, 0, 0, lambda *a: 0)
        h.pread_structured(8192, 0, lambda buf, off, kind, err: 0, nbd.CMD_FLAG_DF)
        pieces = []
        h.pread_structured(8 << 20, 1000, lambda buf, off, kind, err: pieces.append((off, len(buf), kind)))
        if sum(p[1] for p in pieces) != 8 << 20:
            print("pieces", pieces)
    if h.pread(512, 0) != b"\0" * 512:
        print("not zero")
    h.shutdown()

# What INFO told of one export must not be what GO enters.
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(uri)
h.set_export_name("vol")
h.opt_info()
h.set_export_name("no-such-export")
expect(errno.ENOENT, "go", h.opt_go)
h.set_export_name("vol")
h.opt_go()
h.flush()
h.shutdown()
print("done")
`

// TestLibnbdReadOnly: a client is told, and refused if it tries.
func TestLibnbdReadOnly(t *testing.T) {
	d, exports := newVolume(blocktest.Options{})
	d.SetReadOnly(true)
	exports.(nbd.Fixed)[0].Info.ReadOnly = true
	addr, _ := serve(t, exports, nbd.Options{})
	r := rawEnter(t, addr, "vol", true)
	r.wantErrno(wire.EPERM, wire.CmdWrite, 0, 0, 512, make([]byte, 512))
	r.wantErrno(wire.EPERM, wire.CmdTrim, 0, 0, 512, nil)
	r.wantErrno(wire.EPERM, wire.CmdWriteZeroes, 0, 0, 512, nil)
	r.alive()
	uri := "nbd+unix:///vol?socket=" + url.QueryEscape(strings.TrimPrefix(addr, "unix:"))
	if out := run(t, "nbdinfo", "--is", "read-only", uri); out != "" {
		t.Errorf("%s", out)
	}
	out, err := command(t, "qemu-io", "-f", "raw", "-c", "write 0 512", uri)
	if err == nil || !strings.Contains(out, "Permission denied") {
		t.Errorf("qemu-io: %v\n%s", err, out)
	}
}
