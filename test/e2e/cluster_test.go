package e2e

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"firn.io/firn/nbd/client"
	"firn.io/firn/nbd/wire"
	"firn.io/firn/test/stamp"
)

// nbdDevice is a volume seen through a few NBD connections, as stamp works on it.
type nbdDevice struct {
	conns []*client.Conn
	next  chan *client.Conn
}

func dialVolume(t testing.TB, addr, volume string, connections int) *nbdDevice {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	d := &nbdDevice{next: make(chan *client.Conn, connections)}
	for range connections {
		c, err := client.Dial(ctx, addr, client.Options{Export: volume})
		if err != nil {
			t.Fatal(err)
		}
		d.conns = append(d.conns, c)
		d.next <- c
	}
	t.Cleanup(d.abort)
	return d
}

// abort cuts the connections.
func (d *nbdDevice) abort() {
	for _, c := range d.conns {
		c.Abort()
	}
}

func (d *nbdDevice) do(ctx context.Context, call *client.Call) error {
	c := <-d.next
	d.next <- c
	return c.Do(ctx, call)
}

func (d *nbdDevice) ReadAt(ctx context.Context, p []byte, off int64) error {
	return d.do(ctx, &client.Call{Command: wire.CmdRead, Data: p, Off: uint64(off)})
}

func (d *nbdDevice) WriteAt(ctx context.Context, p []byte, off int64) error {
	return d.do(ctx, &client.Call{Command: wire.CmdWrite, Data: p, Off: uint64(off)})
}

func (d *nbdDevice) Trim(ctx context.Context, off, n int64) error {
	return d.do(ctx, &client.Call{Command: wire.CmdTrim, Off: uint64(off), Bytes: uint64(n)})
}

func (d *nbdDevice) Flush(ctx context.Context) error {
	return d.do(ctx, &client.Call{Command: wire.CmdFlush})
}

// sinceStart tells the time to a load.
func sinceStart() func() time.Duration {
	start := time.Now()
	return func() time.Duration { return time.Since(start) }
}

// checkAll reads every sector that the load may have written and judges it.
func checkAll(t testing.TB, dev stamp.Device, load *stamp.Load, sectors int64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	const step = 2048 // sectors, 1 MiB
	p := make([]byte, step*stamp.SectorBytes)
	for from := int64(0); from < sectors; from += step {
		n := min(step, sectors-from)
		r := load.History().BeginRead(from)
		if err := dev.ReadAt(ctx, p[:n*stamp.SectorBytes], from*stamp.SectorBytes); err != nil {
			r.Failed()
			t.Fatalf("read back at sector %d: %v", from, err)
		}
		if err := r.Check(p[:n*stamp.SectorBytes]); err != nil {
			t.Fatal(err)
		}
	}
}

// background runs a load until stop is called; stop returns how it ended.
func background(load *stamp.Load, dev stamp.Device) (stop func() error) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- load.Run(ctx, dev, sinceStart()) }()
	return func() error {
		cancel()
		return <-ended
	}
}

// awaitOperations returns once the load has done n more operations.
func awaitOperations(t testing.TB, load *stamp.Load, n uint64) {
	t.Helper()
	awaitTrue(t, fmt.Sprintf("%d more operations", n), func() bool { return load.Operations() >= n }, load.Operations())
}

// awaitTrue asks until ok holds. For what has no event to wait for.
func awaitTrue(t testing.TB, what string, ok func() bool, since ...any) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(patience)
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("waited in vain for %s %v", what, since)
		}
	}
}

// cluster is an etcd, three nodes and a gateway, each a process.
type cluster struct {
	t       testing.TB
	dir     string
	etcd    *process
	etcdURL string
	nodes   [3]*process
	args    [3][]string
	gateway *server
}

func startEtcd(t testing.TB, dir string) (*process, string) {
	t.Helper()
	clients, peers := freeAddr(t), freeAddr(t)
	p := launch(t, "etcd", "--data-dir", dir, "--listen-client-urls", "http://"+clients, "--advertise-client-urls", "http://"+clients,
		"--listen-peer-urls", "http://"+peers, "--initial-advertise-peer-urls", "http://"+peers, "--initial-cluster", "default=http://"+peers)
	awaitTrue(t, "etcd to listen", func() bool {
		c, err := net.Dial("tcp", clients)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return p, "http://" + clients
}

func startCluster(t testing.TB) *cluster {
	t.Helper()
	c := &cluster{t: t, dir: t.TempDir()}
	c.etcd, c.etcdURL = startEtcd(t, filepath.Join(c.dir, "etcd"))
	for i := range c.nodes {
		c.args[i] = []string{"node", "--json", "--id", fmt.Sprint(i + 1), "--disk", filepath.Join(c.dir, fmt.Sprintf("node%d", i+1)) + "=20G",
			"--etcd", c.etcdURL, "--listen", freeAddr(t), "--http", freeAddr(t), "--zone", fmt.Sprintf("z%d", i+1)}
		c.startNode(i)
	}
	c.gateway = serve(t, []string{"gateway", "--json", "--id", "gw1", "--data", filepath.Join(c.dir, "gw1"), "--etcd", c.etcdURL,
		"--nbd", freeAddr(t), "--api", freeAddr(t), "--http", freeAddr(t)})
	return c
}

func (c *cluster) startNode(i int) {
	c.t.Helper()
	c.nodes[i] = launch(c.t, firnBinary, c.args[i]...)
	c.nodes[i].await(c.nodes[i].stdout, "\n}\n")
}

func TestThreeNodesOneKilledUnderLoad(t *testing.T) {
	c := startCluster(t)
	c.gateway.firn("volume", "create", "v", "256M")
	if out := c.gateway.firn("node", "ls"); strings.Count(out, " up ") != 3 {
		t.Fatalf("not three nodes:\n%s", out)
	}
	const sectors = 128 << 20 / stamp.SectorBytes
	load := stamp.NewLoad(stamp.Options{Seed: 3, Sectors: sectors, Workers: 16, MaxSectors: 128, ReadPercent: 40, TrimPercent: 5, ErrorsEnd: true})
	dev := dialVolume(t, c.gateway.NBD, "v", 4)
	stop := background(load, dev)
	goOn := func(n uint64) { awaitOperations(t, load, load.Operations()+n) }
	goOn(500)
	for i := range c.nodes {
		load.ResetStall()
		c.nodes[i].kill()
		goOn(1500)
		measured(t, "node %d killed: longest operation %.2f s (aim: at most 3 s)", i+1, load.LongestStall().Seconds())
		c.startNode(i)
		goOn(500)
		// The next node can be killed without an outage once this one votes
		// again: what was written so far must then be readable without it.
		c.awaitCaughtUp(i)
	}
	if err := stop(); err != nil {
		t.Fatalf("the load: %v", err)
	}
	checkAll(t, dev, load, sectors)
	acked, unknown, checked := load.History().Counts()
	t.Logf("%d writes acknowledged, %d of unknown outcome, %d sectors judged", acked, unknown, checked)

	// All but one replica of everything gone for a moment: what the two
	// restarted ones hold is a whole volume.
	c.nodes[2].kill()
	checkAll(t, dev, load, sectors)
}

// awaitCaughtUp waits until node i says that it is ready: its replicas have
// applied what their leaders had committed.
func (c *cluster) awaitCaughtUp(i int) {
	c.t.Helper()
	http := c.args[i][slices.Index(c.args[i], "--http")+1]
	awaitTrue(c.t, fmt.Sprintf("node %d to catch up", i+1), func() bool { return httpStatus("http://"+http+"/readyz") == 200 })
}

func TestEtcdAwayAttachedGoesOn(t *testing.T) {
	c := startCluster(t)
	c.gateway.firn("volume", "create", "v", "64M")
	const sectors = 64 << 20 / stamp.SectorBytes
	load := stamp.NewLoad(stamp.Options{Seed: 4, Sectors: sectors, Workers: 8, ReadPercent: 40, ErrorsEnd: true})
	dev := dialVolume(t, c.gateway.NBD, "v", 2)
	stop := background(load, dev)
	awaitOperations(t, load, load.Operations()+300)
	c.etcd.kill()
	begin := time.Now()
	// Longer than the lease: from then on reads are checked at the leaders.
	awaitTrue(t, "the lease to run out", func() bool { return time.Since(begin) > 4*time.Second })
	awaitOperations(t, load, load.Operations()+300)
	if err := stop(); err != nil {
		t.Fatalf("the load without etcd: %v", err)
	}
	r := try(t, firnBinary, "volume", "create", "w", "1G", "--api", c.gateway.API, "--timeout", "5s")
	if r.exit != 6 || !strings.Contains(r.stderr, "firn: ") {
		t.Errorf("create without etcd: exit %d, %s", r.exit, r.stderr)
	}
	checkAll(t, dev, load, sectors)
}

func TestRestartFindsEverything(t *testing.T) {
	t.Parallel()
	for _, nodes := range []string{"1", "3"} {
		dir := t.TempDir()
		s := up(t, dir, "--nodes", nodes, "--volume", "v=128M")
		const sectors = 32 << 20 / stamp.SectorBytes
		load := stamp.NewLoad(stamp.Options{Seed: 5, Sectors: sectors, Workers: 16, MaxSectors: 256, ReadPercent: 30, TrimPercent: 5})
		for round := range 4 {
			dev := dialVolume(t, s.NBD, "v", 3)
			stop := background(load, dev)
			awaitOperations(t, load, load.Operations()+600)
			begin := time.Now()
			if round%2 == 0 {
				s.kill() // under load
				dev.abort()
				if err := stop(); err != nil {
					t.Fatal(err)
				}
			} else {
				if err := stop(); err != nil {
					t.Fatal(err)
				}
				if err := s.stop(); err != nil {
					t.Fatalf("stop: %v\n%s", err, s.stderr)
				}
			}
			s = s.again()
			checkAll(t, dialVolume(t, s.NBD, "v", 1), load, sectors)
			measured(t, "%s nodes, restart %d and read back: %.1f s", nodes, round+1, time.Since(begin).Seconds())
		}
		if err := s.stop(); err != nil {
			t.Errorf("stop: %v", err)
		}
	}
}
