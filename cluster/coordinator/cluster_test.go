package coordinator_test

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"firn.io/firn/cluster/coordinator"
	"firn.io/firn/cluster/meta"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
)

var background = context.Background()

// cluster is a metadata server and nodes, in one world. The nodes register, make
// the replicas that the catalog orders (by acknowledging them) and each runs a
// candidate, as cluster/node does; only storage is left out.
type cluster struct {
	t     *testing.T
	world *loop.World
	mem   *meta.Mem
	admin *meta.MemClient // never cut, never faulty
	nodes []*node
	// deleted are the (volume, group) pairs that were made tombstones.
	deleted map[string]bool
	// deleteFails makes DeleteInGroup fail so many times out of 100.
	deleteFails int
	volumes     int
}

type node struct {
	c     *cluster
	id    block.NodeID
	zone  string
	disks []meta.DiskMeta
	// slow keeps it from making new replicas members; replaceAfter is that of its
	// candidate.
	slow         bool
	replaceAfter time.Duration

	loop   *loop.Sim
	client *meta.MemClient
	store  *recorder
	coord  *coordinator.Coordinator
}

// recorder counts the transactions of a process, and those that took effect.
type recorder struct {
	meta.Store
	sent, took int
}

func (r *recorder) Txn(ctx context.Context, t meta.Txn) (meta.TxnResult, error) {
	r.sent++
	res, err := r.Store.Txn(ctx, t)
	if err == nil && res.Succeeded && len(t.Then) > 0 {
		r.took++
	}
	return res, err
}

func newCluster(t *testing.T, seed uint64, nodes int) *cluster {
	w := loop.NewWorld(seed)
	server := w.NewLoop(nil)
	c := &cluster{t: t, world: w, mem: meta.NewMem(server), deleted: map[string]bool{}}
	c.admin = c.mem.Client()
	server.Post(func() { c.mem.Drive(server) })
	for i := range nodes {
		n := &node{c: c, id: block.NodeID(i + 1), zone: fmt.Sprintf("z%d", i%3)}
		n.disks = []meta.DiskMeta{{ID: c.uuid(), CapacityBytes: 1 << 40}}
		c.nodes = append(c.nodes, n)
		n.start()
	}
	if !w.RunUntil(20*time.Second, func() bool { return c.live() == nodes && c.leader() != nil }) {
		t.Fatalf("seed %d: the cluster did not come up", seed)
	}
	return c
}

func (c *cluster) uuid() [16]byte {
	var u [16]byte
	for i := range u {
		u[i] = byte(c.world.Rand().Uint32())
	}
	return block.MarkUUID(u)
}

func (n *node) start() {
	n.loop = n.c.world.NewLoop(nil)
	n.client = n.c.mem.Client()
	n.store = &recorder{Store: n.client}
	l, s := n.loop, meta.Store(n.client)
	reg := meta.Registration{
		Node:        meta.NodeMeta{ID: n.id, Addr: fmt.Sprintf("node%d:7410", n.id), Zone: n.zone, Disks: n.disks},
		Incarnation: n.c.world.Rand().Uint64(), Boot: "boot",
	}
	var register func(lease meta.LeaseID)
	var session *meta.Session
	register = func(lease meta.LeaseID) {
		var err error
		l.Do(loop.Meta, func() { _, err = meta.RegisterNode(background, s, reg, lease) }, func() {
			if err != nil && session.Lease() == lease {
				l.After(300*time.Millisecond, func() { register(lease) })
			}
		})
	}
	session = meta.NewSession(l, s, meta.NodeTTL, register, nil)
	groups := meta.NewMirror(l, s, meta.GroupsPrefix, func(kv meta.KV) {
		if g, err := meta.DecodeGroup(kv); kv.Exists() && err == nil {
			n.obey(g)
		}
	}, nil)
	n.coord = coordinator.New(coordinator.Config{Loop: l, Store: n.store, Node: n.id, Deleter: n, ReplaceAfter: n.replaceAfter})
	l.Post(func() {
		session.Start(background)
		groups.Start(background)
		n.coord.Start(background)
	})
}

// obey makes the replicas that the group has here, and says so.
func (n *node) obey(g meta.GroupMeta) {
	for _, r := range g.Replicas {
		if r.Node == n.id && !r.Created {
			n.ack(g.ID, r)
		}
		if r.Joining && (r.Node == n.id && r.Created && !n.slow || r.GivenUp) {
			n.end(g, r)
		}
	}
}

func (n *node) ack(g block.GroupID, r meta.ReplicaMeta) {
	var err error
	l := n.loop
	l.Do(loop.Meta, func() { err = meta.AckReplicaCreated(background, n.client, g, r.Replica, r.Disk) }, func() {
		if err != nil {
			l.After(200*time.Millisecond, func() { n.ack(g, r) })
		}
	})
}

// end makes the new replica a member, as the group's leader does.
func (n *node) end(g meta.GroupMeta, r meta.ReplicaMeta) {
	var err error
	l := n.loop
	now := meta.Membership{Index: g.ConfVersion + 30, Last: r.Replica}
	for _, m := range g.Replicas {
		if r.GivenUp && !m.Joining || !r.GivenUp && !m.Leaving {
			now.Members = append(now.Members, m.Replica)
		}
	}
	l.Do(loop.Meta, func() {
		err = meta.EndReplacement(background, n.client, g.ID, r.Replica, now)
	}, func() {
		if err != nil {
			l.After(200*time.Millisecond, func() { n.end(g, r) })
		}
	})
}

// DeleteInGroup implements coordinator.Deleter.
func (n *node) DeleteInGroup(_ context.Context, v meta.VolumeMeta, g block.GroupID, done func(error)) {
	if v.State != meta.Deleting {
		n.c.t.Errorf("a volume in state %s is told to be deleted", v.State)
	}
	l := n.loop
	l.After(time.Duration(l.Rand().IntN(5))*time.Millisecond, func() {
		if l.Rand().IntN(100) < n.c.deleteFails {
			done(block.Errorf(block.Unavailable, "the group has no leader"))
			return
		}
		n.c.deleted[fmt.Sprint(v.ID, g)] = true
		done(nil)
	})
}

func (n *node) kill() { n.loop.Kill() }

func (n *node) restart() {
	n.kill()
	n.start()
}

func (c *cluster) live() int {
	live, err := meta.ListLive(background, c.admin)
	c.must(err)
	return len(live)
}

// leader is the one whose key stands in the store and who knows it.
func (c *cluster) leader() *node {
	kv, err := c.admin.Get(background, meta.ElectionKey)
	c.must(err)
	if !kv.Exists() {
		return nil
	}
	l, err := meta.DecodeLeader(kv)
	c.must(err)
	n := c.nodes[l.Node-1]
	if n.loop.Dead() || !n.coord.Leading() {
		return nil
	}
	return n
}

func (c *cluster) must(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) create(size int64, replicas int) block.VolumeID {
	c.t.Helper()
	c.volumes++
	v, err := meta.CreateVolume(background, c.admin, meta.NewVolume{
		ID: c.uuid(), Name: fmt.Sprintf("vol%d", c.volumes), SizeBytes: size, Replicas: replicas,
	})
	c.must(err)
	return v.ID
}

func (c *cluster) volume(id block.VolumeID) *meta.VolumeMeta {
	c.t.Helper()
	v, err := meta.GetVolume(background, c.admin, id)
	c.must(err)
	return &v
}

func (c *cluster) state(id block.VolumeID) meta.VolumeState { return c.volume(id).State }

func (c *cluster) gone(id block.VolumeID) bool {
	_, err := meta.GetVolume(background, c.admin, id)
	return err != nil && block.KindOf(err) == block.NotFound
}

func (c *cluster) until(what string, limit time.Duration, cond func() bool) {
	c.t.Helper()
	if !c.world.RunUntil(limit, cond) {
		c.t.Fatalf("within %v never: %s", limit, what)
	}
}

// check holds at any time.
func (c *cluster) check() {
	c.t.Helper()
	groups, err := meta.ListGroups(background, c.admin)
	c.must(err)
	byID := map[block.GroupID]meta.GroupMeta{}
	for _, g := range groups {
		byID[g.ID] = g
		nodes := map[block.NodeID]bool{}
		for _, r := range g.Replicas {
			if r.Leaving || r.Lost {
				continue
			}
			if nodes[r.Node] {
				c.t.Errorf("group %d has two replicas on node %d", g.ID, r.Node)
			}
			nodes[r.Node] = true
		}
	}
	counter, err := c.admin.Get(background, meta.GroupCounterKey)
	c.must(err)
	if len(groups) > 0 && string(counter.Value) < fmt.Sprint(groups[len(groups)-1].ID) && len(counter.Value) <= len(fmt.Sprint(groups[len(groups)-1].ID)) {
		c.t.Errorf("the counter says %s, group %d exists", counter.Value, groups[len(groups)-1].ID)
	}
	volumes, err := meta.ListVolumes(background, c.admin)
	c.must(err)
	for _, v := range volumes {
		if v.State == meta.Ready && len(v.Spans) < meta.SpansFor(v.SizeBytes) {
			c.t.Errorf("volume %s is ready with %d spans for %d bytes", v.Name, len(v.Spans), v.SizeBytes)
		}
		for _, span := range v.Spans {
			sorted := slices.Sorted(slices.Values(span))
			if len(slices.Compact(sorted)) != len(span) {
				c.t.Errorf("volume %s names a group twice in one span: %v", v.Name, span)
			}
			for _, id := range span {
				g, ok := byID[id]
				if !ok || !g.Created() || len(g.Replicas) < v.Replicas {
					c.t.Errorf("volume %s was given group %d: %+v", v.Name, id, g)
				}
			}
		}
	}
}

// checkDeleted: every group of a volume that is gone was told.
func (c *cluster) checkDeleted(v meta.VolumeMeta) {
	c.t.Helper()
	for _, g := range v.Groups() {
		if !c.deleted[fmt.Sprint(v.ID, g)] {
			c.t.Errorf("volume %s is gone, group %d was never told", v.Name, g)
		}
	}
}
