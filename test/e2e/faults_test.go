package e2e

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"firn.io/firn/test/faultproxy"
	"firn.io/firn/test/stamp"
)

// signal sends s to the process alone.
func (p *process) signal(s syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatalf("%v to %s: %v", s, p.name, err)
	}
}

// field is a cluster of three nodes, each behind a proxy for all that others
// send it, an etcd and two gateways, with a stamped load on one volume through
// whichever gateway lets it in.
type field struct {
	*cluster
	etcdArgs []string
	proxies  [3]*faultproxy.Proxy
	gateways [2]*server
	load     *stamp.Load
	dev      *roamingDevice
	stop     func() error
}

const fieldSectors = 48 << 20 / stamp.SectorBytes

func startField(t testing.TB) *field {
	t.Helper()
	f := &field{cluster: &cluster{t: t, dir: t.TempDir()}}
	clients, peers := freeAddr(t), freeAddr(t)
	f.etcdURL = "http://" + clients
	f.etcdArgs = []string{"--data-dir", filepath.Join(f.dir, "etcd"), "--listen-client-urls", f.etcdURL, "--advertise-client-urls", f.etcdURL,
		"--listen-peer-urls", "http://" + peers, "--initial-advertise-peer-urls", "http://" + peers, "--initial-cluster", "default=http://" + peers}
	f.startEtcd()
	for i := range f.nodes {
		listen := freeAddr(t)
		p, err := faultproxy.New(listen)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(p.Close)
		f.proxies[i] = p
		f.args[i] = []string{"node", "--json", "--id", fmt.Sprint(i + 1), "--disk", filepath.Join(f.dir, fmt.Sprintf("node%d", i+1)) + "=20G",
			"--etcd", f.etcdURL, "--listen", listen, "--advertise", p.Addr(), "--http", freeAddr(t), "--zone", fmt.Sprintf("z%d", i+1)}
		f.startNode(i)
	}
	for i := range f.gateways {
		f.gateways[i] = serve(t, []string{"gateway", "--json", "--id", fmt.Sprintf("gw%d", i+1), "--data", filepath.Join(f.dir, fmt.Sprintf("gw%d", i+1)),
			"--etcd", f.etcdURL, "--nbd", freeAddr(t), "--api", freeAddr(t), "--http", freeAddr(t)})
	}
	f.gateways[0].firn("volume", "create", "v", "64M")
	f.dev = roam(t, "v", f.gateways[0].NBD, f.gateways[1].NBD)
	f.load = stamp.NewLoad(stamp.Options{Seed: 7, Sectors: fieldSectors, Workers: 12, MaxSectors: 64, ReadPercent: 40, TrimPercent: 5, ErrorsEnd: true})
	f.stop = background(f.load, f.dev)
	f.goOn(200)
	return f
}

func (f *field) startEtcd() {
	f.t.Helper()
	f.etcd = launch(f.t, "etcd", f.etcdArgs...)
}

// goOn returns once the load has done n more operations.
func (f *field) goOn(n uint64) {
	f.t.Helper()
	last, since := f.load.Operations(), time.Now()
	want := last + n
	awaitTrue(f.t, fmt.Sprintf("%d more operations", n), func() bool {
		if now := f.load.Operations(); now != last {
			last, since = now, time.Now()
		} else if time.Since(since) > standstill {
			f.t.Fatalf("no progress for %v: %v", standstill, f.stop())
		}
		return last >= want
	})
}

// lasting returns after d, which is how long a fault is to last.
func (f *field) lasting(d time.Duration) {
	begin := time.Now()
	awaitTrue(f.t, "the fault to last", func() bool { return time.Since(begin) >= d })
}

// settle waits until everything is well again, so that the next fault is one
// and not two.
func (f *field) settle() {
	f.t.Helper()
	for i := range f.nodes {
		f.awaitCaughtUp(i)
	}
	for _, g := range f.gateways {
		awaitTrue(f.t, "the gateway", func() bool { return httpStatus("http://"+g.HTTP+"/readyz") == 200 })
	}
	f.goOn(50)
}

// finish ends the load and judges every sector.
func (f *field) finish() {
	f.t.Helper()
	if err := f.stop(); err != nil {
		f.t.Fatalf("the load: %v", err)
	}
	if err := f.load.Verify(f.t.Context(), f.dev); err != nil {
		f.t.Fatal(err)
	}
	acked, unknown, checked := f.load.History().Counts()
	f.t.Logf("%d writes acknowledged, %d of unknown outcome, %d sectors judged, %d times dialed", acked, unknown, checked, f.dev.moves)
}

// fault is something that happens to the field and is over when do returns.
type fault struct {
	name string
	do   func(f *field, i int)
	of   int // how many processes it can happen to
}

var faults = []fault{
	{"kill -9 of a node", func(f *field, i int) {
		f.nodes[i].kill()
		f.goOn(200)
		f.startNode(i)
	}, 3},
	{"a node stopped for 5 s", func(f *field, i int) {
		f.nodes[i].signal(syscall.SIGSTOP)
		f.lasting(5 * time.Second)
		f.nodes[i].signal(syscall.SIGCONT)
	}, 3},
	{"kill -9 of the gateway in use", func(f *field, _ int) {
		i := f.dev.Gateway()
		f.gateways[i].kill()
		f.goOn(100)
		f.gateways[i] = f.gateways[i].again()
	}, 1},
	{"the gateway in use stopped until the other has the volume", func(f *field, _ int) {
		i := f.dev.Gateway()
		f.gateways[i].signal(syscall.SIGSTOP)
		awaitTrue(f.t, "the other gateway to take over", func() bool { return f.dev.Gateway() != i })
		f.goOn(100)
		// The old owner goes on with what it had in flight.
		f.gateways[i].signal(syscall.SIGCONT)
		f.goOn(100)
	}, 1},
	{"the gateway in use stopped for 4 s", func(f *field, _ int) {
		g := f.gateways[f.dev.Gateway()]
		g.signal(syscall.SIGSTOP)
		f.lasting(4 * time.Second)
		g.signal(syscall.SIGCONT)
	}, 1},
	{"kill -9 of etcd, away for 6 s", func(f *field, _ int) {
		f.etcd.kill()
		f.lasting(6 * time.Second)
		f.startEtcd()
	}, 1},
	{"etcd stopped for 6 s", func(f *field, _ int) {
		f.etcd.signal(syscall.SIGSTOP)
		f.lasting(6 * time.Second)
		f.etcd.signal(syscall.SIGCONT)
	}, 1},
	{"all that a node receives is late by 30 ms", func(f *field, i int) {
		f.proxies[i].Set(faultproxy.Pass, 30*time.Millisecond)
		f.lasting(2 * time.Second)
		f.proxies[i].Set(faultproxy.Pass, 0)
	}, 3},
	{"connections to a node cut three times", func(f *field, i int) {
		for range 3 {
			f.proxies[i].Cut()
			f.goOn(50)
		}
	}, 3},
	{"connections to a node refused and cut for 3 s", func(f *field, i int) {
		f.proxies[i].Set(faultproxy.Refuse, 0)
		f.proxies[i].Cut()
		f.lasting(3 * time.Second)
		f.proxies[i].Set(faultproxy.Pass, 0)
	}, 3},
	{"connections to a node dead without a word for 5 s", func(f *field, i int) {
		f.proxies[i].Set(faultproxy.Blackhole, 0)
		f.lasting(5 * time.Second)
		f.proxies[i].Set(faultproxy.Pass, 0)
	}, 3},
	{"connections to a node half open: it hears nothing for 5 s", func(f *field, i int) {
		f.proxies[i].Set(faultproxy.BlackholeToServer, 0)
		f.lasting(5 * time.Second)
		f.proxies[i].Set(faultproxy.Pass, 0)
	}, 3},
	{"connections to a node half open: its answers are lost for 5 s", func(f *field, i int) {
		f.proxies[i].Set(faultproxy.BlackholeToClient, 0)
		f.lasting(5 * time.Second)
		f.proxies[i].Cut()
		f.proxies[i].Set(faultproxy.Pass, 0)
	}, 3},
}

// TestFaults lets one fault after another happen under load. An error at the
// client, a wrong byte, or no progress for a minute fails it; stalls are
// measured. The long variant goes on with faults drawn from a seed.
func TestFaults(t *testing.T) {
	f := startField(t)
	one := func(x fault, i int) {
		f.settle()
		f.load.ResetStall()
		x.do(f, i)
		f.goOn(50)
		measured(t, "%s (%d): longest operation %.2f s", x.name, i+1, f.load.LongestStall().Seconds())
	}
	for n, x := range faults {
		one(x, n%x.of)
	}
	if os.Getenv("FIRN_TEST_LONG") != "" {
		seed := uint64(time.Now().UnixNano())
		if text := os.Getenv("FIRN_FAULTS_SEED"); text != "" {
			n, err := strconv.ParseUint(text, 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			seed = n
		}
		t.Logf("FIRN_FAULTS_SEED=%d", seed)
		r := rand.New(rand.NewPCG(seed, 0))
		for begin := time.Now(); time.Since(begin) < 8*time.Minute; {
			x := faults[r.IntN(len(faults))]
			one(x, r.IntN(x.of))
		}
	}
	f.settle()
	f.finish()
}

// TestRollingRestart upgrades everything in place, as an operator does: each
// node, each gateway and etcd in turn, with the orderly stop.
func TestRollingRestart(t *testing.T) {
	f := startField(t)
	restarted := func(what string, stop func() error, start func()) {
		f.settle()
		f.load.ResetStall()
		begin := time.Now()
		if err := stop(); err != nil {
			t.Errorf("stop of %s: %v", what, err)
		}
		ended := time.Since(begin)
		f.goOn(100)
		start()
		f.goOn(100)
		measured(t, "%s restarted: it stopped in %.2f s, longest operation %.2f s", what, ended.Seconds(), f.load.LongestStall().Seconds())
	}
	for i := range f.nodes {
		restarted(fmt.Sprintf("node %d", i+1), f.nodes[i].stop, func() { f.startNode(i) })
	}
	for range f.gateways {
		i := f.dev.Gateway()
		restarted(fmt.Sprintf("gateway %d, the one in use (aim: handed over in under 1 s)", i+1), f.gateways[i].stop, func() { f.gateways[i] = f.gateways[i].again() })
		if f.dev.Gateway() == i {
			t.Errorf("the load did not move away from gateway %d", i+1)
		}
	}
	restarted("etcd", func() error { f.etcd.stop(); return nil }, f.startEtcd)
	f.finish()
}

// TestDetach: who may take a volume away, and how.
func TestDetach(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	first := c.gateway
	second := serve(t, []string{"gateway", "--json", "--id", "gw2", "--data", filepath.Join(c.dir, "gw2"), "--etcd", c.etcdURL,
		"--nbd", freeAddr(t), "--api", freeAddr(t), "--http", freeAddr(t)})
	first.firn("volume", "create", "v", "64M")
	if out := first.firn("detach", "v"); out != "v is not attached\n" {
		t.Errorf("detach of a free volume: %q", out)
	}
	dev := dialVolume(t, first.NBD, "v", 1)
	if err := dev.WriteAt(t.Context(), []byte(strings.Repeat("a", 4096)), 0); err != nil {
		t.Fatal(err)
	}
	// A live owner with clients is never robbed (F6), whichever gateway is asked.
	for _, s := range []*server{first, second} {
		if r := try(t, firnBinary, "detach", "v", "--api", s.API); r.exit != 5 || !strings.Contains(r.stderr, "1 client") || !strings.Contains(r.stderr, "--force") {
			t.Errorf("detach by %s: exit %d, %s", s.API, r.exit, r.stderr)
		}
	}
	if r := try(t, "nbdinfo", second.uri("v")); r.exit == 0 {
		// INFO does not attach; entering does.
		if r := try(t, "qemu-io", "-f", "raw", "-c", "read 0 4096", second.uri("v")); r.exit == 0 {
			t.Errorf("the other gateway let a client in beside the owner")
		}
	}
	// With force it moves, cleanly: no lease is waited for.
	begin := time.Now()
	if out := second.firn("detach", "v", "--force"); out != "v is detached from gateway gw1\n" {
		t.Errorf("detach --force: %q", out)
	}
	if err := dev.WriteAt(t.Context(), make([]byte, 4096), 0); err == nil {
		t.Errorf("the client that was cut off wrote on")
	}
	if r := try(t, "qemu-io", "-f", "raw", "-c", "read 0 4096", first.uri("v")); r.exit == 0 {
		t.Errorf("gateway 1 took the volume back at once")
	}
	run(t, "qemu-io", "-f", "raw", "-c", "read -P 97 0 4096", "-c", "write -P 98 0 4096", second.uri("v"))
	measured(t, "detach --force and attach at the other gateway: %.2f s", time.Since(begin).Seconds())

	// An owner that does not answer: not without force, and with it at once.
	dev = dialVolume(t, second.NBD, "v", 1)
	second.signal(syscall.SIGSTOP)
	var r result
	if r = try(t, firnBinary, "detach", "v", "--api", first.API); r.exit != 5 || !strings.Contains(r.stderr, "does not answer") {
		// Its lease may have ended while it was asked.
		if r.exit != 0 {
			t.Errorf("detach from a gateway that is stopped: exit %d, %s", r.exit, r.stderr)
		}
	}
	if out := first.firn("detach", "v", "--force"); !strings.Contains(out, "v is not attached") && !strings.Contains(out, "which does not answer") {
		t.Errorf("detach --force from a gateway that is stopped: %q", out)
	}
	run(t, "qemu-io", "-f", "raw", "-c", "read -P 98 0 4096", "-c", "write -P 99 0 4096", first.uri("v"))
	second.signal(syscall.SIGCONT)
	if err := dev.WriteAt(t.Context(), make([]byte, 4096), 0); err == nil {
		t.Errorf("the old owner's client wrote on")
	}
	run(t, "qemu-io", "-f", "raw", "-c", "read -P 99 0 4096", first.uri("v"))
}

// TestRolesWaitForEtcd: a machine that starts before etcd comes up by itself, and
// says what it waits for until then.
func TestRolesWaitForEtcd(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	clients, peers := freeAddr(t), freeAddr(t)
	url := "http://" + clients
	web, gatewayWeb, nbd, api := freeAddr(t), freeAddr(t), freeAddr(t), freeAddr(t)
	node := launch(t, firnBinary, "node", "--json", "--id", "1", "--disk", dir+"/node=10G", "--etcd", url, "--listen", freeAddr(t), "--http", web)
	gateway := launch(t, firnBinary, "gateway", "--json", "--id", "g", "--data", dir+"/gw", "--etcd", url, "--nbd", nbd, "--api", api, "--http", gatewayWeb)
	for _, p := range []*process{node, gateway} {
		p.await(p.stderr, "waiting for etcd")
	}
	for _, addr := range []string{web, gatewayWeb} {
		if code, body := httpGet("http://" + addr + "/readyz"); code != 503 || !strings.Contains(body, clients) {
			t.Errorf("readyz without etcd: %d, %s", code, body)
		}
		if code := httpStatus("http://" + addr + "/healthz"); code != 200 {
			t.Errorf("healthz without etcd: %d", code)
		}
	}
	etcd := launch(t, "etcd", "--data-dir", dir+"/etcd", "--listen-client-urls", url, "--advertise-client-urls", url,
		"--listen-peer-urls", "http://"+peers, "--initial-advertise-peer-urls", "http://"+peers, "--initial-cluster", "default=http://"+peers)
	for _, p := range []*process{node, gateway} {
		p.await(p.stdout, "\n}\n")
	}
	awaitTrue(t, "the gateway", func() bool { return httpStatus("http://"+gatewayWeb+"/readyz") == 200 })
	s := &server{process: gateway, serving: serving{NBD: nbd, API: api, HTTP: gatewayWeb}}
	s.firn("volume", "create", "v", "64M")
	libnbd(t, s.uri("v"), "h.pwrite(b'x'*4096, 0)")

	// Without a node the gateway is not ready.
	if err := node.stop(); err != nil {
		t.Errorf("stop of the node: %v", err)
	}
	if code, body := httpGet("http://" + gatewayWeb + "/readyz"); code != 503 || !strings.Contains(body, "no storage node") {
		t.Errorf("readyz without a node: %d, %s", code, body)
	}

	// Without etcd: a page and a status that say so, errors as JSON, and a stop
	// that neither waits nor fails.
	etcd.kill()
	awaitTrue(t, "the page to tell", func() bool {
		code, body := httpGet("http://" + gatewayWeb + "/")
		return code == 200 && strings.Contains(body, "does not answer")
	})
	if r := try(t, firnBinary, "status", "--api", api); r.exit != 0 || !strings.Contains(r.stdout, "does not answer") {
		t.Errorf("status without etcd: exit %d, %s%s", r.exit, r.stdout, r.stderr)
	}
	if r := try(t, firnBinary, "volume", "show", "v", "--json", "--timeout", "2s", "--api", api); r.exit != 6 || !strings.Contains(r.stderr, `"kind": "unavailable"`) {
		t.Errorf("show --json without etcd: exit %d, %s", r.exit, r.stderr)
	}
	begin := time.Now()
	if err := gateway.stop(); err != nil {
		t.Errorf("stop of the gateway: %v\n%s", err, gateway.stderr)
	}
	measured(t, "the gateway stopped in %.2f s without etcd", time.Since(begin).Seconds())
	if c, err := net.Dial("tcp", nbd); err == nil {
		c.Close()
		t.Errorf("somebody still listens at %s", nbd)
	}
}
