package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestNbdcopyBothWays(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	const n = 320 << 20
	image(t, dir+"/in.img", n, 1)
	s := up(t, dir+"/data", "--volume", "disk=320M")
	begin := time.Now()
	run(t, "nbdcopy", dir+"/in.img", s.uri("disk"))
	written := time.Since(begin)
	begin = time.Now()
	run(t, "nbdcopy", s.uri("disk"), dir+"/out.img")
	measured(t, "nbdcopy of 320 MiB: in %.1f s, out %.1f s", written.Seconds(), time.Since(begin).Seconds())
	run(t, "cmp", dir+"/in.img", dir+"/out.img")
}

func TestNbdinfo(t *testing.T) {
	t.Parallel()
	s := up(t, t.TempDir(), "--volume", "a=64M", "--volume", "b=1G")
	var info struct {
		Exports []struct {
			Name     string   `json:"export-name"`
			Size     int64    `json:"export-size"`
			Multi    bool     `json:"can_multi_conn"`
			FUA      bool     `json:"can_fua"`
			Trim     bool     `json:"can_trim"`
			Zero     bool     `json:"can_zero"`
			Contexts []string `json:"contexts"`
		} `json:"exports"`
	}
	if err := json.Unmarshal([]byte(run(t, "nbdinfo", "--json", s.uri("a"))), &info); err != nil || len(info.Exports) != 1 {
		t.Fatalf("%+v, %v", info, err)
	}
	e := info.Exports[0]
	if e.Size != 64<<20 || !e.Multi || !e.FUA || !e.Trim || !e.Zero || fmt.Sprint(e.Contexts) != "[base:allocation]" {
		t.Errorf("%+v", e)
	}
	list := run(t, "nbdinfo", "--list", "nbd://"+s.NBD)
	for _, want := range []string{`export="a"`, `export="b"`} {
		if !strings.Contains(list, want) {
			t.Errorf("the list lacks %s:\n%s", want, list)
		}
	}
	if r := try(t, "nbdinfo", s.uri("nobody")); r.exit == 0 {
		t.Errorf("an unknown export was found: %s", r.stdout)
	}
}

func TestQemuConvertCompareMap(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	image(t, dir+"/raw.img", 256<<20, 2)
	run(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", dir+"/raw.img", dir+"/in.qcow2")
	s := up(t, dir+"/data", "--volume", "vm=256M")
	run(t, "qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", dir+"/in.qcow2", s.uri("vm"))
	run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", dir+"/raw.img", s.uri("vm"))
	run(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", s.uri("vm"), dir+"/back.qcow2")
	run(t, "qemu-img", "compare", dir+"/in.qcow2", dir+"/back.qcow2")

	// What qemu-img wrote as zeros is known to be zero.
	var extents []struct {
		Start, Length int64
		Data, Zero    bool
	}
	if err := json.Unmarshal([]byte(run(t, "qemu-img", "map", "--output=json", "-f", "raw", s.uri("vm"))), &extents); err != nil {
		t.Fatal(err)
	}
	var data, zero, end int64
	for _, e := range extents {
		if e.Start != end {
			t.Fatalf("the map has a gap at %d", end)
		}
		end += e.Length
		if e.Zero {
			zero += e.Length
		} else {
			data += e.Length
		}
	}
	if end != 256<<20 || data == 0 || zero < 32<<20 {
		t.Errorf("map covers %d bytes, %d of data, %d of zeros", end, data, zero)
	}
}

func TestQemuIOPatterns(t *testing.T) {
	t.Parallel()
	s := up(t, t.TempDir(), "--nodes", "3", "--volume", "v=128M")
	steps := []string{
		"write -P 0xab 0 64k", "read -P 0xab 0 64k",
		"write -P 0xcd 512 512", "read -P 0xab 0 512", "read -P 0xcd 512 512", "read -P 0xab 1024 63k",
		"write -P 0x11 4M 3M", "write -P 0x22 5000k 1k", "read -P 0x22 5000k 1k", "read -P 0x11 4M 900k",
		"write -z 5M 1M", "read -P 0 5M 1M", "read -P 0x11 6M 1M",
		"discard 0 64k", "read -P 0 0 64k",
		"write -f -P 0x33 127M 1M", "read -P 0x33 127M 1M",
		"aio_write -P 0x44 16M 1M", "aio_write -P 0x55 17M 1M", "aio_flush", "read -P 0x44 16M 1M", "read -P 0x55 17M 1M",
		"writev -P 0x66 32M 4k 512 8k", "read -P 0x66 32M 12800", "flush",
	}
	args := []string{"-f", "raw"}
	for _, step := range steps {
		args = append(args, "-c", step)
	}
	out := run(t, "qemu-io", append(args, s.uri("v"))...)
	if strings.Contains(out, "failed") || strings.Contains(out, "error") {
		t.Errorf("%s", out)
	}
}

func TestFioVerify(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := up(t, dir+"/data", "--nodes", "3", "--volume", "v=512M")
	for _, job := range []string{
		"--rw=randwrite --bs=4k --size=16m --offset_increment=64m --iodepth=16 --numjobs=4",
		"--rw=randwrite --bsrange=512-128k --blockalign=512 --size=24m --offset_increment=64m --iodepth=8 --numjobs=4",
		"--rw=write --bs=1m --size=96m --offset_increment=128m --iodepth=4 --numjobs=2",
		"--rw=randrw --bs=4k --size=8m --offset_increment=64m --iodepth=16 --numjobs=4 --fsync=32",
	} {
		log := filepath.Join(dir, "fio.txt")
		args := append([]string{"--name=verify", "--ioengine=nbd", "--uri=" + s.uri("v"), "--group_reporting", "--output=" + log,
			"--verify=crc32c", "--verify_state_save=0", "--verify_fatal=1", "--do_verify=1", "--random_generator=tausworthe64"}, strings.Fields(job)...)
		run(t, "fio", args...)
		report := run(t, "cat", log)
		if !strings.Contains(report, "err= 0") {
			t.Errorf("fio %s:\n%s", job, report)
		}
	}
}

// libnbd runs a Python program against s with `h` connected to the volume.
func libnbd(t testing.TB, uri, program string) string {
	t.Helper()
	return run(t, "/usr/bin/python3", "-c", "import nbd,time\nh=nbd.NBD()\nh.add_meta_context('base:allocation')\nh.connect_uri('"+uri+"')\n"+program)
}

func TestSmallIO(t *testing.T) {
	t.Parallel()
	s := up(t, t.TempDir(), "--volume", "v=64M")
	libnbd(t, s.uri("v"), `
for off in (0, 1, 511, 4095, 4096, 5000, (4<<20)-1, (64<<20)-3):
    h.pwrite(b'abc', off)
    assert bytes(h.pread(3, off)) == b'abc', off
    h.pwrite(b'Z', off+1)
    assert bytes(h.pread(3, off)) == b'aZc', off
h.pwrite(b'\x01'*1000000, 1234567)
h.zero(333333, 1300001)
assert bytes(h.pread(1000000, 1234567)) == b'\x01'*(1300001-1234567) + b'\0'*333333 + b'\x01'*(1000000-333333-(1300001-1234567))
h.trim(100001, 1234600)
assert bytes(h.pread(100001, 1234600)) == b'\0'*100001
assert bytes(h.pread(33, 1234567)) == b'\x01'*33
`)
}

func TestUnixSocket(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := serve(t, []string{"up", "--json", "--data", dir + "/data", "--nbd", "unix:" + dir + "/nbd.sock", "--api", freeAddr(t), "--http", freeAddr(t), "--volume", "v=64M"})
	uri := "nbd+unix:///v?socket=" + dir + "/nbd.sock"
	if got := strings.TrimSpace(run(t, "nbdinfo", "--size", uri)); got != "67108864" {
		t.Errorf("size %s", got)
	}
	if err := s.stop(); err != nil {
		t.Errorf("%v", err)
	}
	s = s.again()
	libnbd(t, uri, "h.pwrite(b'x'*4096, 0)")
	s.kill()
	s = s.again() // the socket's file that kill -9 left is in nobody's way
	libnbd(t, uri, "assert bytes(h.pread(4096, 0)) == b'x'*4096")
}

func TestTrimOf16TiB(t *testing.T) {
	t.Parallel()
	s := up(t, t.TempDir(), "--volume", "big=16T")
	filled := 512 // MiB at the start, and something in every 64 GiB
	if os.Getenv("FIRN_TEST_LONG") != "" {
		filled = 8192
	}
	out := libnbd(t, s.uri("big"), fmt.Sprintf("filled = %d\n", filled)+`
total = h.get_size()
assert total == 16 << 40
def good(*a):
    assert a[-1].value == 0, 'request failed: errno %d' % a[-1].value
    return 1
mib = nbd.Buffer.from_bytearray(bytearray(b'\x5a' * (1 << 20)))
block = nbd.Buffer.from_bytearray(bytearray(b'\x5a' * 4096))
for i in range(filled):
    h.aio_pwrite(mib, i << 20, completion=good)
    while h.aio_in_flight() > 16: h.poll(-1)
places = [i << 36 for i in range(1, 256)] + [total - 4096]
for p in places:
    h.aio_pwrite(block, p, completion=good)
    while h.aio_in_flight() > 16: h.poll(-1)
while h.aio_in_flight(): h.poll(-1)
places += range(0, filled << 20, 1 << 20)
assert bytes(h.pread(4096, total-4096)) == b'\x5a' * 4096
most = (1 << 32) - (4 << 20)
begin = time.monotonic()
off = 0
while off < total:
    n = min(most, total - off)
    h.aio_trim(n, off, completion=good)
    off += n
    while h.aio_in_flight() > 256: h.poll(-1)
while h.aio_in_flight(): h.poll(-1)
print('%.2f' % (time.monotonic() - begin))
for p in places:
    assert bytes(h.pread(4096, p)) == b'\0' * 4096, p
`)
	measured(t, "TRIM of 16 TiB in requests of 4 GiB: %s s (aim: under 1 s)", strings.TrimSpace(out))
	began := time.Now()
	awaitTrue(t, "the space of what was trimmed", func() bool { return s.liveBytes() < 1<<20 })
	measured(t, "%d MiB of it are free after another %.1f s", filled, time.Since(began).Seconds())
}

// liveBytes is what the disks of the server hold of live data.
func (s *server) liveBytes() (n int64) {
	s.t.Helper()
	var status struct {
		Nodes []struct {
			Disks []struct {
				LiveBytes int64 `json:"live_bytes"`
			} `json:"disks"`
		} `json:"nodes"`
	}
	if err := json.Unmarshal([]byte(s.firn("status", "--json")), &status); err != nil {
		s.t.Fatal(err)
	}
	for _, node := range status.Nodes {
		for _, d := range node.Disks {
			n += d.LiveBytes
		}
	}
	return n
}
