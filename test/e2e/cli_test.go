package e2e

import (
	"bytes"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func httpGet(url string) (int, string) {
	c := http.Client{Timeout: 5 * time.Second}
	r, err := c.Get(url)
	if err != nil {
		return 0, err.Error()
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return 0, err.Error()
	}
	return r.StatusCode, string(body)
}

func httpStatus(url string) int {
	code, _ := httpGet(url)
	return code
}

func TestVolumeCommands(t *testing.T) {
	t.Parallel()
	s := up(t, t.TempDir(), "--nodes", "3")
	var v struct {
		Name       string `json:"name"`
		SizeBytes  int64  `json:"size_bytes"`
		Replicas   int    `json:"replicas"`
		ReadOnly   bool   `json:"read_only"`
		State      string `json:"state"`
		AttachedTo string `json:"attached_to"`
	}
	ask := func(args ...string) {
		t.Helper()
		v.Name = ""
		if err := json.Unmarshal([]byte(s.firn(append(args, "--json")...)), &v); err != nil {
			t.Fatalf("%v: %v", args, err)
		}
	}
	ask("volume", "create", "db", "1G")
	if v.Name != "db" || v.SizeBytes != 1<<30 || v.Replicas != 3 || v.State != "ready" {
		t.Errorf("created %+v", v)
	}
	ask("volume", "create", "one", "64M", "--replicas", "1", "--block-size", "4096")
	if v.Replicas != 1 {
		t.Errorf("created %+v", v)
	}
	if out := s.firn("volume", "ls"); !strings.Contains(out, "db") || !strings.Contains(out, "one") {
		t.Errorf("ls:\n%s", out)
	}
	ask("volume", "rename", "one", "two")
	if v.Name != "two" {
		t.Errorf("renamed %+v", v)
	}
	libnbd(t, s.uri("two"), "h.pwrite(b'x'*4096, 0)")

	ask("volume", "set", "two", "read-only=on")
	if !v.ReadOnly {
		t.Errorf("set %+v", v)
	}
	libnbd(t, s.uri("two"), `
assert h.is_read_only()
assert bytes(h.pread(4096, 0)) == b'x'*4096
h.set_strict_mode(0)
try:
    h.pwrite(b'y'*4096, 0)
except nbd.Error as e:
    assert e.errno == 'EPERM', e.errno
else:
    raise SystemExit('a read-only volume was written')
`)
	ask("volume", "set", "two", "read-only=off")
	libnbd(t, s.uri("two"), "h.pwrite(b'y'*4096, 0)")

	// Grow reaches new connections at once; shrink asks for --shrink, and what
	// was cut off reads zero when it grows again.
	libnbd(t, s.uri("db"), "h.pwrite(b'z'*65536, (1<<30)-65536)")
	ask("volume", "resize", "db", "2G")
	if got := strings.TrimSpace(run(t, "nbdinfo", "--size", s.uri("db"))); got != "2147483648" {
		t.Errorf("size after grow: %s", got)
	}
	libnbd(t, s.uri("db"), "h.pwrite(b'w'*4096, (2<<30)-4096)\nassert bytes(h.pread(65536, (1<<30)-65536)) == b'z'*65536")
	if r := try(t, firnBinary, "volume", "resize", "db", "512M", "--api", s.API); r.exit != 2 || !strings.Contains(r.stderr, "--shrink") {
		t.Errorf("shrink without --shrink: exit %d, %s", r.exit, r.stderr)
	}
	ask("volume", "resize", "db", "512M", "--shrink")
	if v.SizeBytes != 512<<20 {
		t.Errorf("shrunk %+v", v)
	}
	ask("volume", "resize", "db", "2G")
	libnbd(t, s.uri("db"), "assert bytes(h.pread(65536, (1<<30)-65536)) == b'\\0'*65536\nassert bytes(h.pread(4096, (2<<30)-4096)) == b'\\0'*4096")

	// Somebody is on it: rm refuses.
	dev := dialVolume(t, s.NBD, "db", 1)
	if r := try(t, firnBinary, "volume", "rm", "db", "--yes", "--api", s.API); r.exit != 5 || !strings.Contains(r.stderr, "attached") {
		t.Errorf("rm of an attached volume: exit %d, %s", r.exit, r.stderr)
	}
	if out := s.firn("volume", "show", "db"); !strings.Contains(out, "clients here  1") {
		t.Errorf("show:\n%s", out)
	}
	dev.abort()
	if r := try(t, firnBinary, "volume", "rm", "two", "--api", s.API); r.exit != 2 || !strings.Contains(r.stderr, "--yes") {
		t.Errorf("rm without --yes and without a terminal: exit %d, %s", r.exit, r.stderr)
	}
	awaitTrue(t, "the end of the attachment", func() bool {
		return try(t, firnBinary, "volume", "rm", "db", "--yes", "--api", s.API).exit == 0
	})
	if r := try(t, firnBinary, "volume", "show", "db", "--api", s.API); r.exit != 3 {
		t.Errorf("show of a removed volume: exit %d, %s", r.exit, r.stderr)
	}
	// The name is free and the new volume is empty.
	ask("volume", "create", "db", "1G")
	libnbd(t, s.uri("db"), "assert bytes(h.pread(1<<20, 0)) == b'\\0'*(1<<20)")

	if out := s.firn("status"); !strings.Contains(out, "3 of 3 nodes up") || !strings.Contains(out, "healthy") {
		t.Errorf("status:\n%s", out)
	}
	if out := s.firn("health"); out != "healthy\n" {
		t.Errorf("health: %q", out)
	}
	var nodes []struct {
		Alive bool `json:"alive"`
	}
	if err := json.Unmarshal([]byte(s.firn("node", "ls", "--json")), &nodes); err != nil || len(nodes) != 3 || !nodes[2].Alive {
		t.Errorf("node ls: %+v, %v", nodes, err)
	}
}

// TestShrinkUnderClients is refused, but for --force; and a create that is not
// waited for says what may be.
func TestShrinkUnderClients(t *testing.T) {
	t.Parallel()
	s := up(t, t.TempDir(), "--volume", "v=128M")
	dev := dialVolume(t, s.NBD, "v", 1)
	if err := dev.WriteAt(t.Context(), bytes.Repeat([]byte{7}, 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	var v struct {
		UsedBytes int64 `json:"used_bytes"`
	}
	if err := json.Unmarshal([]byte(s.firn("volume", "show", "v", "--json")), &v); err != nil || v.UsedBytes != 1<<20 {
		t.Errorf("used: %+v, %v", v, err)
	}
	r := try(t, firnBinary, "volume", "resize", "v", "64M", "--shrink", "--api", s.API)
	if r.exit != 5 || !strings.Contains(r.stderr, "has 1 client at gateway up") || !strings.Contains(r.stderr, "--force") {
		t.Errorf("shrink under a client: exit %d, %s", r.exit, r.stderr)
	}
	if out := s.firn("volume", "resize", "v", "256M", "--shrink"); !strings.Contains(out, "v is 256M now") {
		t.Errorf("grow with --shrink: %s", out)
	}
	if out := s.firn("volume", "resize", "v", "64M", "--shrink", "--force"); !strings.Contains(out, "v is 64M now") {
		t.Errorf("shrink with --force: %s", out)
	}
	r = try(t, firnBinary, "volume", "create", "late", "64M", "--timeout", "1ms", "--api", s.API)
	if r.exit != 6 || !strings.Contains(r.stderr, "`firn volume show late` tells") {
		t.Errorf("create without patience: exit %d, %s", r.exit, r.stderr)
	}
}

func TestHTTP(t *testing.T) {
	t.Parallel()
	s := up(t, t.TempDir(), "--volume", "v=64M")
	libnbd(t, s.uri("v"), "h.pwrite(b'x'*65536, 0)")
	for path, want := range map[string]string{
		"/healthz": "ok", "/readyz": "ok", "/": "<td>v<td>64M", "/metrics": "firn_disk_written_bytes_total{",
	} {
		if code, body := httpGet("http://" + s.HTTP + path); code != 200 || !strings.Contains(body, want) {
			t.Errorf("%s: %d, %.2000s", path, code, body)
		}
	}
	libnbd(t, s.uri("v"), "h.pwrite(b'y'*100, 5000); h.trim(1<<20, 1<<20)")
	_, body := httpGet("http://" + s.HTTP + "/metrics")
	for _, want := range []string{
		`firn_volume_zeroed_bytes_total{volume="v"} 1.048576e+06`, `firn_volume_edge_reads_total{volume="v"} 1`, `firn_volume_waited_total{volume="v"} 0`,
		`firn_volume_abandoned_total{volume="v"} 0`, `firn_volume_joined_zeroes_total{volume="v",what="requests"} 0`, `firn_volume_joined_zeroes_total{volume="v",what="joins"} 0`,
		`firn_nbd_bad_connections_total{reason="moved"} 0`,
	} {
		if !strings.Contains(body, want+"\n") {
			t.Errorf("/metrics has no line %s", want)
		}
	}
	if code, _ := httpGet("http://" + s.HTTP + "/nothing"); code != 404 {
		t.Errorf("unknown page: %d", code)
	}
}

func TestConfigurationFileAndEnvironment(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	nbd, api := freeAddr(t), freeAddr(t)
	text := "data: " + dir + "/data\nnbd: " + nbd + "\napi: " + api + "\nhttp: " + freeAddr(t) + "\nvolume: [a=64M, b=128M]\njson: true\n"
	if err := os.WriteFile(dir+"/firn.yaml", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	s := serve(t, []string{"up", "--config", dir + "/firn.yaml"})
	if s.NBD != nbd {
		t.Errorf("NBD on %s, configured %s", s.NBD, nbd)
	}
	if out := run(t, "env", "FIRN_API="+api, firnBinary, "volume", "ls"); !strings.Contains(out, "a ") || !strings.Contains(out, "128M") {
		t.Errorf("ls:\n%s", out)
	}
}

// TestBadInput is the table of what people get wrong, with what they are told.
func TestBadInput(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := up(t, dir+"/data", "--nodes", "2", "--volume", "v=64M")
	taken := s.NBD

	volume := func(args ...string) []string { return append(append([]string{"volume"}, args...), "--api", s.API) }
	elsewhere := func(args ...string) []string {
		return append([]string{args[0], "--api", freeAddr(t), "--http", freeAddr(t)}, args[1:]...)
	}
	for _, c := range []struct {
		name string
		args []string
		exit int
		text string
	}{
		{"size 0", volume("create", "x", "0"), 2, "size"},
		{"no multiple of the block", volume("create", "x", "1000"), 2, "multiple of"},
		{"no multiple of 4096", volume("create", "x", "1025K", "--block-size", "4096"), 2, "multiple of"},
		{"odd block size", volume("create", "x", "1G", "--block-size", "1024"), 2, "block size"},
		{"beyond the limit", volume("create", "x", "1000P"), 2, ""},
		{"too many replicas", volume("create", "x", "1G", "--replicas", "3"), 2, "nodes"},
		{"even replicas", volume("create", "x", "1G", "--replicas", "2"), 2, "replicas"},
		{"duplicate", volume("create", "v", "1G"), 4, "v"},
		{"bad name", volume("create", "No Name", "1G"), 2, "name"},
		{"show unknown", volume("show", "x"), 3, "x"},
		{"resize unknown", volume("resize", "x", "1G"), 3, "x"},
		{"rename to taken", volume("rename", "v", "v"), 4, "v"},
		{"rm unknown", volume("rm", "x", "--yes"), 3, "x"},
		{"folder in use", elsewhere("up", "--data", dir+"/data", "--nbd", freeAddr(t)), 5, "process"},
		{"port in use", elsewhere("up", "--data", dir+"/other", "--nbd", taken), 5, "another process listens"},
		{"bad volume flag", elsewhere("up", "--data", dir+"/other2", "--nbd", freeAddr(t), "--volume", "v"), 2, "NAME=SIZE"},
		{"beyond loopback", elsewhere("up", "--data", dir+"/other3", "--nbd", freeAddr(t), "--api", "0.0.0.0:0"), 2, "--insecure"},
		{"etcd's certificate without key", []string{"node", "--id", "1", "--disk", dir + "/n", "--etcd", "https://127.0.0.1:1", "--etcd-cert", "x.pem", "--listen", freeAddr(t), "--http", freeAddr(t)}, 2, "--etcd-key"},
		{"detach unknown", []string{"detach", "x", "--api", s.API}, 3, "x"},
		{"detach of no device", []string{"detach", "/dev/nbd77", "--run-dir", dir, "--api", s.API}, 3, "/dev/nbd77"},
		{"node without id", []string{"node", "--disk", dir + "/n", "--etcd", "http://127.0.0.1:1"}, 2, "--id"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := try(t, firnBinary, c.args...)
			if r.exit != c.exit || !strings.Contains(r.stderr, c.text) || !strings.HasPrefix(r.stderr, "firn: ") {
				t.Errorf("exit %d, want %d; stderr %q, want %q in it", r.exit, c.exit, r.stderr, c.text)
			}
		})
	}
	// Nothing of that has hurt.
	libnbd(t, s.uri("v"), "h.pwrite(b'x'*4096, 0); assert bytes(h.pread(4096, 0)) == b'x'*4096")
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	r := try(t, firnBinary, elsewhere("up", "--data", dir+"/data", "--nbd", freeAddr(t), "--nodes", "1")...)
	if r.exit != 2 || !strings.Contains(r.stderr, "2 nodes") {
		t.Errorf("fewer nodes than before: exit %d, %s", r.exit, r.stderr)
	}
	s = s.again()
	libnbd(t, s.uri("v"), "assert bytes(h.pread(4096, 0)) == b'x'*4096")
}

func TestBadNBDRequests(t *testing.T) {
	t.Parallel()
	s := up(t, t.TempDir(), "--volume", "v=64M")
	// Clients that stall in the handshake or send garbage, while another works.
	for _, text := range []string{"", "GET / HTTP/1.1\r\n\r\n", "\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x07\xff\xff\xff\xff", strings.Repeat("\xff", 4096)} {
		c, err := net.Dial("tcp", s.NBD)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	libnbd(t, s.uri("v"), `
h.set_strict_mode(0)
def refused(errno, f, *a):
    try: f(*a)
    except nbd.Error as e: assert e.errno == errno, (errno, e.errno, str(e))
    else: raise SystemExit('accepted: %s %s' % (f, a))
size = h.get_size()
refused('EINVAL', h.pread, 4096, size)
refused('EINVAL', h.pread, 4096, size - 1)
refused('ENOSPC', h.pwrite, b'x' * 4096, size - 1)
refused('EINVAL', h.trim, 4096, size)
refused('ENOSPC', h.zero, 4096, size)
h.pwrite(b'q' * 512, size - 512)
assert bytes(h.pread(512, size - 512)) == b'q' * 512
`)
}

// TestAbortedUpKeepsItsNodes: a start with more nodes that fails leaves the folder
// as it was: neither are fewer refused, nor are nodes known that never came.
func TestAbortedUpKeepsItsNodes(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "node-3"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r := try(t, firnBinary, "up", "--data", dir, "--nodes", "16", "--nbd", freeAddr(t), "--api", freeAddr(t), "--http", freeAddr(t))
	if r.exit == 0 || !strings.Contains(r.stderr, "node-3") {
		t.Fatalf("up with a file for a node's folder: exit %d, %s", r.exit, r.stderr)
	}
	s := up(t, dir, "--nodes", "1", "--volume", "v=64M")
	if out := s.firn("node", "ls"); strings.Count(out, "\n") != 2 || !strings.Contains(out, " up ") {
		t.Errorf("nodes of an aborted start are left:\n%s", out)
	}
	if err := s.stop(); err != nil {
		t.Error(err)
	}
	if r := try(t, firnBinary, "up", "--data", dir, "--nodes", "2", "--nbd", "nowhere:x"); r.exit == 0 {
		t.Error("up at an address that is none")
	}
	up(t, dir, "--nodes", "1")
}
