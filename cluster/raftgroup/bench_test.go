package raftgroup_test

import (
	"context"
	"fmt"
	"sync"
	"syscall"
	"testing"

	"firn.io/firn/cluster/raftgroup"
	"firn.io/firn/cluster/transport"
	"firn.io/firn/cluster/transport/grpc"
	"firn.io/firn/cluster/transport/inproc"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/payload"
)

// memLog is a raftgroup.Log in memory for loops of real time: what a turn
// appends is durable at the turn's end, after a piece of work that stands for
// the disk. Payloads it forgets: followers are fed from what the host retains.
type memLog struct {
	loop loop.Loop
	work func()

	mu   sync.Mutex
	disk disk

	waiting []func(error)
	busy    bool
}

func (l *memLog) FirstIndex() uint64 { return l.disk.first }
func (l *memLog) LastIndex() uint64  { return l.disk.first + uint64(len(l.disk.ents)) - 1 }
func (l *memLog) Term(i uint64) (uint64, bool) {
	if i+1 < l.disk.first || i > l.LastIndex() {
		return 0, false
	}
	return l.disk.term(i), true
}
func (l *memLog) HardState() raftgroup.HardState { return l.disk.hard }

func (l *memLog) Append(w raftgroup.LogWrite, done func(error)) {
	l.mu.Lock()
	d := &l.disk
	for _, e := range w.Entries {
		e.Payload = nil
		d.ents = append(d.ents[:e.Index-d.first], e)
	}
	if w.HardState != nil {
		d.hard = *w.HardState
	}
	l.mu.Unlock()
	l.waiting = append(l.waiting, done)
	if !l.busy {
		l.busy = true
		l.loop.Defer(l.sync)
	}
}

func (l *memLog) sync() {
	batch := l.waiting
	l.waiting = nil
	l.loop.Do(loop.DiskWrite, l.work, func() {
		for _, done := range batch {
			done(nil)
		}
		l.busy = false
		if len(l.waiting) > 0 {
			l.busy = true
			l.sync()
		}
	})
}

func (l *memLog) Read(lo, hi uint64, _ int, _ bool) ([]raftgroup.LogEntry, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if lo < l.disk.first || lo > l.LastIndex() {
		return nil, block.Errorf(block.NotFound, "entry %d is not in the log", lo)
	}
	var out []raftgroup.LogEntry
	for _, e := range l.disk.ents[lo-l.disk.first:] {
		if e.Index >= hi || len(out) == 64 {
			break
		}
		out = append(out, e)
	}
	return out, nil
}

// counting is a state machine that only counts.
type counting struct {
	applied raftgroup.EntryID
	conf    []byte
}

func (m *counting) Applied() raftgroup.EntryID { return m.applied }
func (m *counting) Conf() []byte               { return m.conf }
func (m *counting) Apply(id raftgroup.EntryID, _ *wire.Command) (wire.ApplyResult, error) {
	m.applied = id
	return wire.ApplyResult{Outcome: wire.OutcomeApplied}, nil
}
func (m *counting) ApplyEmpty(id raftgroup.EntryID)             { m.applied = id }
func (m *counting) ApplyConf(id raftgroup.EntryID, conf []byte) { m.applied, m.conf = id, conf }

// real is a node with loops, and maybe sockets, of real time.
type real struct {
	id    block.NodeID
	loop  *loop.System
	net   transport.Network
	host  *raftgroup.Host
	peers map[block.NodeID]transport.Peer
	addrs map[block.NodeID]string
	in    map[transport.Peer]block.NodeID
}

func (r *real) Peer(n block.NodeID) transport.Peer {
	if r.peers[n] == nil {
		r.peers[n] = r.net.Dial(context.Background(), r.addrs[n], r)
	}
	return r.peers[n]
}

func (r *real) Receive(p transport.Peer, m transport.Message) {
	if m.Type == transport.TypeHello {
		h, _ := transport.DecodeHello(m.Header)
		r.in[p] = h.Node
		return
	}
	r.host.Receive(r.in[p], m)
}

func (r *real) Closed(p transport.Peer, _ error) {
	delete(r.in, p)
	for n, o := range r.peers {
		if o == p {
			r.host.Unreachable(n)
		}
	}
}

// startReal starts nodes with groups and returns them with the groups, all of
// which the first node leads.
func startReal(t testing.TB, kind string, nodes, groups int) ([]*real, []*raftgroup.Group) {
	fabric := inproc.NewFabric(nil)
	members := make(map[block.ReplicaID]block.NodeID)
	for i := range nodes {
		members[block.ReplicaID(i+1)] = block.NodeID(i + 1)
	}
	conf := raftgroup.NewConf(members)
	var all []*real
	addrs := make(map[block.NodeID]string)
	for i := range nodes {
		r := &real{id: block.NodeID(i + 1), loop: loop.NewSystem(clock.System{}, loop.DefaultLimits),
			peers: make(map[block.NodeID]transport.Peer), addrs: addrs, in: make(map[transport.Peer]block.NodeID)}
		id := transport.Identity{Hello: transport.Hello{Node: r.id}}
		listen := ":0"
		if kind == "grpc" {
			r.net = grpc.New(grpc.Options{Loop: r.loop, Identity: id})
			listen = "127.0.0.1:0"
		} else {
			r.net = fabric.Network(fmt.Sprint(r.id), r.loop, id)
		}
		r.loop.Call(func() {
			addr, stop, err := r.net.Listen(context.Background(), listen, r)
			if err != nil {
				t.Error(err)
				return
			}
			addrs[r.id] = addr
			t.Cleanup(stop)
		})
		t.Cleanup(r.loop.Stop)
		r.host = raftgroup.NewHost(raftgroup.Config{Node: r.id, Loop: r.loop, Sender: r, Incarnation: 1})
		all = append(all, r)
	}
	led := make(chan *raftgroup.Group, groups*64) // groups that the first node leads
	for _, r := range all {
		r.loop.Call(func() {
			r.host.Start()
			for g := range groups {
				l := &memLog{loop: r.loop, work: func() {}, disk: *newDisk(nil)}
				m := &counting{applied: raftgroup.EntryID{Index: raftgroup.InitialIndex, Term: raftgroup.InitialTerm}, conf: conf.Append(nil)}
				r.host.Open(raftgroup.GroupConfig{Group: block.GroupID(g + 1), Replica: block.ReplicaID(r.id), Log: l, State: m,
					Changed: func(g *raftgroup.Group) {
						switch {
						case g.Leading() && r.id == 1:
							led <- g
						case g.Leading():
							g.TransferLeader(1)
						}
					}}, func(g *raftgroup.Group, err error) {
					if err != nil {
						t.Error(err)
					}
				})
			}
		})
	}
	leaders := make([]*raftgroup.Group, groups)
	for n := 0; n < groups; {
		g := <-led
		if leaders[g.ID()-1] == nil {
			n++
		}
		leaders[g.ID()-1] = g
	}
	return all, leaders
}

// driver keeps depth proposals in flight, on the loop of the leaders.
type driver struct {
	groups       []*raftgroup.Group
	toSend, left int
	next         int
	bytes        int
	crcs         []uint32
	failed       int
	done         chan struct{}
}

func (d *driver) send() {
	if d.toSend == 0 {
		return
	}
	d.toSend--
	g := d.groups[d.next%len(d.groups)]
	d.next++
	cmd := wire.Command{Type: wire.CmdWrite, OpSeq: block.OpSeq(d.next), Count: uint16(d.bytes / block.Size), PayloadBytes: uint32(d.bytes), CRCs: d.crcs}
	g.Propose(&cmd, payload.New(d.bytes), func(_ wire.ApplyResult, s wire.Status) {
		if s != wire.StatusOK {
			d.failed++
		}
		d.send()
		if d.left--; d.left == 0 {
			close(d.done)
		}
	})
}

func drive(t testing.TB, r *real, groups []*raftgroup.Group, n, depth, bytes int) *driver {
	d := &driver{groups: groups, toSend: n, left: n, bytes: bytes, crcs: make([]uint32, bytes/block.Size), done: make(chan struct{})}
	r.loop.Call(func() {
		for range depth {
			d.send()
		}
	})
	<-d.done
	return d
}

func cpuTime() int64 {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return u.Utime.Nano() + u.Stime.Nano()
}

// BenchmarkReplicate is the CPU time of all replicas per write, without a disk.
func BenchmarkReplicate(b *testing.B) {
	for _, kind := range []string{"inproc", "grpc"} {
		for _, c := range []struct{ nodes, groups, bytes, depth int }{
			{1, 8, 4096, 32}, {3, 8, 4096, 1}, {3, 8, 4096, 32}, {3, 8, 4096, 256}, {3, 1, 4096, 32}, {3, 8, 64 << 10, 32},
		} {
			if kind == "grpc" && c.nodes == 1 {
				continue
			}
			b.Run(fmt.Sprintf("%s/replicas=%d/groups=%d/%dKiB/depth=%d", kind, c.nodes, c.groups, c.bytes>>10, c.depth), func(b *testing.B) {
				nodes, leaders := startReal(b, kind, c.nodes, c.groups)
				b.ReportAllocs()
				b.SetBytes(int64(c.bytes))
				cpu := cpuTime()
				b.ResetTimer()
				d := drive(b, nodes[0], leaders, b.N, c.depth, c.bytes)
				b.StopTimer()
				b.ReportMetric(float64(cpuTime()-cpu)/float64(b.N)/1e3, "cpu-us/op")
				if d.failed > 0 {
					b.Errorf("%d of %d proposals failed", d.failed, b.N)
				}
			})
		}
	}
}

// BenchmarkIdle is the CPU time of one second of 300 idle replicas per node.
func BenchmarkIdleTick(b *testing.B) {
	c := newCluster(b, 1, 3, 300, raftgroup.Limits{})
	for _, g := range c.groups {
		c.elect(g)
	}
	cpu := cpuTime()
	b.ResetTimer()
	for range b.N {
		c.world.RunFor(raftgroup.Tick)
	}
	b.ReportMetric(float64(cpuTime()-cpu)/float64(b.N)/900, "cpu-ns/replica-tick")
}

func TestRealLoops(t *testing.T) {
	for _, kind := range []string{"inproc", "grpc"} {
		t.Run(kind, func(t *testing.T) {
			nodes, leaders := startReal(t, kind, 3, 4)
			if d := drive(t, nodes[0], leaders, 2000, 64, 4096); d.failed > 0 {
				t.Errorf("%d proposals failed", d.failed)
			}
		})
	}
}
