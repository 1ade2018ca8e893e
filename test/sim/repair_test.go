package sim

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"firn.io/firn/cluster/coordinator"
	"firn.io/firn/cluster/meta"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/vfs"
)

// repairLimit is how long a repair may take: of little data, once what is wrong
// is known.
const repairLimit = 30 * time.Second

// repaired waits until all groups are whole and nothing is left of replicas that
// were replaced, on disks that are there.
func (c *Cluster) repaired() error {
	there := func(r meta.ReplicaMeta) bool {
		return slices.ContainsFunc(c.nodes, func(s *storage) bool { return s.running() && s.node.Status().Disks[0].ID == r.Disk })
	}
	whole := func() bool {
		for _, g := range c.groupsNow() {
			if !g.Whole() || slices.ContainsFunc(g.Removed, there) {
				return false
			}
		}
		return !slices.ContainsFunc(c.nodes, func(s *storage) bool { return !s.running() || s.node.Status().Retired > 0 })
	}
	if !c.runUntil(repairLimit, whole) {
		return fmt.Errorf("repair: not within %v\n%+v\n%s", repairLimit, c.groupsNow(), c.state())
	}
	return nil
}

// lastIDs is the highest replica id that was given out for each group.
func (c *Cluster) lastIDs() map[block.GroupID]block.ReplicaID {
	out := map[block.GroupID]block.ReplicaID{}
	for _, g := range c.groupsNow() {
		out[g.ID] = g.LastReplica
		for _, r := range g.Replicas {
			out[g.ID] = max(out[g.ID], r.Replica)
		}
	}
	return out
}

// settle ends the load and checks everything: what clients read, what replicas
// show, what is live, and that no log is longer than it may be.
func (c *Cluster) settle(l *load) error {
	if err := cmp.Or(c.quiesce(l), c.verify(l.w), c.compare(&Report{})); err != nil {
		return err
	}
	var long string
	short := func() bool {
		long = ""
		for _, s := range c.nodes {
			for _, d := range s.node.Status().Disks {
				if d.LogBytes > pace.LogBytes {
					long = fmt.Sprintf("the log of %s claims %d bytes", nodeName(s.id), d.LogBytes)
				}
			}
		}
		return long == ""
	}
	if !c.runUntil(10*time.Second, short) {
		return fmt.Errorf("truncation: %s\n%s", long, c.state())
	}
	return nil
}

// resume goes on with the load.
func (c *Cluster) resume(l *load) {
	l.stopped = false
	if a := c.attached(); a != nil {
		a.loop.Post(func() { l.fill(a) })
	}
}

// Bytes of a batch's header (docs/format/seglog.md).
const (
	headerMagic  = 0x4c4e5246
	headerNumber = 56
)

// damage stops a node, destroys headers of its log that hold acknowledged
// entries which no checkpoint has, and starts it again.
func (s *storage) damage() error {
	s.kill()
	s.fs, s.store = s.fs.Crash(nil), s.store.Crash(0)
	type header struct {
		name   string
		block  int64
		number uint64
	}
	var found []header
	names, err := s.fs.List(diskDir + "/log")
	if err != nil {
		return err
	}
	for _, name := range names {
		name = diskDir + "/log/" + name
		if !strings.HasSuffix(name, ".seg") {
			continue
		}
		f, err := s.fs.Open(name, vfs.ReadOnly, vfs.ClassLog)
		if err != nil {
			return err
		}
		p := make([]byte, block.Size)
		for b := range pace.SegmentBytes / block.Size {
			if _, err := f.ReadAt(p, b*block.Size); err == nil && binary.LittleEndian.Uint32(p) == headerMagic && p[6] == 1 {
				found = append(found, header{name, b, binary.LittleEndian.Uint64(p[headerNumber:])})
			}
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	slices.SortFunc(found, func(a, b header) int { return cmp.Compare(b.number, a.number) })
	if len(found) < 40 {
		return fmt.Errorf("only %d batches to destroy", len(found))
	}
	for _, h := range found[4:40] {
		if err := s.fs.Rot(h.name, h.block*block.Size+16, 8); err != nil {
			return err
		}
	}
	return s.up()
}

// A replica whose log is rotten is replaced like one that is gone, on the same
// node: there is no other. Its old data goes, and its log with it.
func TestADamagedReplicaIsReplaced(t *testing.T) {
	script(t, small(61), func(c *Cluster, l *load) error {
		c.runFor(3 * time.Second)
		before, last := c.members(), c.lastIDs()
		s := c.nodes[1]
		if err := s.damage(); err != nil {
			return err
		}
		damaged := func() bool {
			return slices.ContainsFunc(c.groupsNow(), func(g meta.GroupMeta) bool {
				return slices.ContainsFunc(g.Replicas, func(r meta.ReplicaMeta) bool { return r.Damaged })
			})
		}
		if !c.runUntil(10*time.Second, damaged) {
			return fmt.Errorf("damage: none was found\n%s", c.state())
		}
		if err := c.repaired(); err != nil {
			return err
		}
		replaced := 0
		for at, r := range c.members() {
			switch {
			case r == before[at]:
			case at.node == s.id && r > last[at.group]:
				replaced++
			default:
				return fmt.Errorf("repair: group %d has replica %d on node %d, and had %d", at.group, r, at.node, before[at])
			}
		}
		removed := s.node.Status().Counters.Removed
		t.Logf("%d replicas replaced, %d removed", replaced, removed)
		if replaced == 0 || removed != uint64(replaced) {
			return fmt.Errorf("repair: %d replaced, %d removed", replaced, removed)
		}
		if err := c.settle(l); err != nil {
			return err
		}
		// The node is whole: another may go.
		c.resume(l)
		c.nodes[0].broken = true
		c.nodes[0].kill()
		c.runFor(3 * time.Second)
		return cmp.Or(c.quiesce(l), c.verify(l.w))
	})
}

// A replica that was found damaged does not open when its node starts, though
// nothing tells the node so but its own disk.
func TestQuarantineOutlivesARestart(t *testing.T) {
	script(t, small(68), func(c *Cluster, l *load) error {
		c.runFor(2 * time.Second)
		c.nodes[2].kill() // so that the damaged ones cannot be replaced
		c.nodes[2].crashDisk()
		s := c.nodes[1]
		disk := s.node.Status().Disks[0].ID
		for _, g := range c.groupsNow() {
			if err := meta.MarkReplicaDamaged(c.ctx, c.Meta.Client(), g.ID, 2, disk); err != nil {
				return err
			}
		}
		c.runFor(time.Second)
		c.Meta.SetDown(true)
		s.kill()
		s.fs, s.store = s.fs.Crash(nil), s.store.Crash(0)
		if err := s.up(); err != nil {
			return err
		}
		for range 20 {
			c.runFor(100 * time.Millisecond)
			for _, r := range s.node.Status().Replicas {
				if r.Open {
					return fmt.Errorf("quarantine: group %d replica %d is open\n%s", r.Group, r.Replica, c.state())
				}
			}
		}
		c.Meta.SetDown(false)
		c.nodes[2].back(0)
		c.runFor(time.Second)
		return cmp.Or(c.repaired(), c.settle(l))
	})
}

// The node of damaged replicas crashes again and again while they are found,
// replaced, filled and removed.
func TestCrashesInARepair(t *testing.T) {
	seeds := 1
	if os.Getenv("FIRN_TEST_LONG") != "" {
		seeds = 20
	}
	for n := range seeds {
		script(t, small(uint64(63+n)), func(c *Cluster, l *load) error {
			c.runFor(3 * time.Second)
			s := c.nodes[1]
			if err := s.damage(); err != nil {
				return err
			}
			r := c.World.Rand()
			for range 10 {
				c.runFor(time.Duration(50+r.IntN(700)) * time.Millisecond)
				if s.running() && r.IntN(2) == 0 {
					s.crashIn = 1 + r.IntN(20)
					c.runUntil(time.Second, func() bool { return !s.running() })
				} else if s.running() {
					s.crash()
				}
				c.runUntil(5*time.Second, s.running)
			}
			s.crashIn = 0
			c.runUntil(5*time.Second, s.running)
			return cmp.Or(c.repaired(), c.settle(l))
		})
	}
}

// A node that is away for longer than its operator allows has its replicas made
// elsewhere. When it is back it takes no part with the old ones, and lets go of them.
func TestANodeThatWasAwayForLongLetsGo(t *testing.T) {
	o := small(67)
	o.Nodes, o.Replicas, o.ReplaceAfter = 4, 3, 6*time.Second
	script(t, o, func(c *Cluster, l *load) error {
		c.runFor(2 * time.Second)
		s, before := c.nodes[0], c.members()
		s.kill()
		s.crashDisk()
		elsewhere := func() bool {
			return !slices.ContainsFunc(c.groupsNow(), func(g meta.GroupMeta) bool {
				return !g.Whole() || slices.ContainsFunc(g.Replicas, func(r meta.ReplicaMeta) bool { return r.Node == s.id })
			})
		}
		if !c.runUntil(repairLimit, elsewhere) {
			return fmt.Errorf("repair: not within %v\n%+v\n%s", repairLimit, c.groupsNow(), c.state())
		}
		had := 0
		for at := range before {
			if at.node == s.id {
				had++
			}
		}
		s.back(0)
		c.runFor(time.Second)
		if err := c.repaired(); err != nil {
			return err
		}
		if n := s.node.Status(); n.Counters.Removed != uint64(had) || len(n.Replicas) > 0 || n.Disks[0].LiveBytes > 0 || n.Disks[0].LogBytes > 0 {
			return fmt.Errorf("removal: node 1 had %d replicas, removed %d, and holds %d bytes of data and %d of log", had, n.Counters.Removed, n.Disks[0].LiveBytes, n.Disks[0].LogBytes)
		}
		t.Logf("%d replicas moved", had)
		return c.settle(l)
	})
}

// A wiped replica is replaced, and its joiner is lost before it was filled: it is
// given up, and another one comes.
func TestALostJoinerIsGivenUp(t *testing.T) {
	o := small(62)
	o.Replicas, o.Pause = 3, 50*time.Millisecond
	script(t, o, func(c *Cluster, l *load) error {
		c.runFor(2 * time.Second)
		last := c.lastIDs()
		s := c.addNode(4)
		if err := s.up(); err != nil {
			return err
		}
		c.runFor(2 * time.Second)
		c.isolate(s, true) // from the others, not from the metadata
		wiped := c.nodes[2]
		disk := wiped.node.Status().Disks[0].ID
		wiped.replace()
		if err := meta.SetDiskFailed(c.ctx, c.Meta.Client(), wiped.id, disk); err != nil {
			return err
		}
		joins := func() bool {
			return slices.ContainsFunc(c.groupsNow(), func(g meta.GroupMeta) bool {
				return slices.ContainsFunc(g.Replicas, func(r meta.ReplicaMeta) bool { return r.Node == s.id && r.Joining && r.Created })
			})
		}
		if !c.runUntil(10*time.Second, joins) {
			return fmt.Errorf("repair: no replica joins on node 4\n%+v", c.groupsNow())
		}
		c.runFor(time.Second)
		s.replace()
		c.runFor(coordinator.DefaultAbsentAfter)
		c.isolate(s, false)
		if err := c.repaired(); err != nil {
			return err
		}
		again := 0
		for id, now := range c.lastIDs() {
			if now > last[id]+1 {
				again++
			}
		}
		if again == 0 {
			return fmt.Errorf("repair: no order was given up: %v, then %v", last, c.lastIDs())
		}
		t.Logf("%d groups ordered twice", again)
		if err := c.settle(l); err != nil {
			return err
		}
		c.resume(l)
		c.nodes[0].broken = true
		c.nodes[0].kill()
		c.runFor(3 * time.Second)
		return cmp.Or(c.quiesce(l), c.verify(l.w))
	})
}
