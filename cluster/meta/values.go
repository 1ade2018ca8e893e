package meta

import (
	"bytes"
	"encoding/json"
	"slices"
	"strconv"

	"firn.io/firn/internal/block"
)

// Format is the version of the values that this build writes: their field "v".
// A value with a higher one is refused with kind Unsupported.
const Format = 1

// ClusterMeta is what is true of the whole cluster, written once.
type ClusterMeta struct {
	V  int             `json:"v"`
	ID block.ClusterID `json:"id"`
}

// VolumeState is where a volume is in its life.
type VolumeState string

const (
	// Creating: it waits for the coordinator to give it groups.
	Creating VolumeState = "creating"
	// Ready: it can be attached.
	Ready VolumeState = "ready"
	// Deleting: its name is free already, its groups are being told.
	Deleting VolumeState = "deleting"
)

// VolumeMeta is one volume. Groups keep a copy of its encoding (S8).
type VolumeMeta struct {
	V    int            `json:"v"`
	ID   block.VolumeID `json:"id"`
	Name string         `json:"name"`
	// SizeBytes is what clients see; a multiple of BlockSize.
	SizeBytes int64 `json:"size"`
	// WantBytes, if above SizeBytes, is the size that it is growing to: the
	// coordinator appends the spans for it, then the owner sets SizeBytes.
	WantBytes int64 `json:"want,omitempty"`
	// BlockSize is the logical block size, 512 or 4096.
	BlockSize int  `json:"block"`
	Replicas  int  `json:"replicas"`
	ReadOnly  bool `json:"ro,omitempty"`

	Generation block.Generation      `json:"gen"`
	Epoch      block.Epoch           `json:"epoch"`
	Settings   block.SettingsCounter `json:"settings"`

	State VolumeState `json:"state"`
	// Waiting says, for people, what a volume that is not ready waits for.
	Waiting string `json:"waiting,omitempty"`
	// Holder is the nonce of the last owner, for as long as nobody took the
	// volume from it: it may write its owner key again. 0: nobody may.
	Holder block.Nonce `json:"holder,omitempty,string"`
	// Forced is set when an owner was removed by force, until a later owner has
	// waited for a lease's time before it exported (F3).
	Forced bool `json:"forced,omitempty"`

	// Spans has, for each TiB of the volume, its groups: chunk i of a span (by
	// its number within the volume) is in Spans[s][i mod len(Spans[s])].
	Spans [][]block.GroupID `json:"spans,omitempty"`
	// Layout rises with each change of Spans. The members of groups have a version
	// of their own, GroupMeta.ConfVersion.
	Layout block.LayoutVersion `json:"layout"`
}

// The bounds of a volume.
const (
	// MaxSpans keeps an encoded volume below wire.MaxVolumeValueBytes at 32
	// groups per span.
	MaxSpans = 512
	// MaxVolumeBytes is the largest size of a volume.
	MaxVolumeBytes = MaxSpans * block.SpanBytes
	// MaxWidth is the largest number of groups of a span.
	MaxWidth = 32
	// MaxReplicas is the largest number of replicas of a group.
	MaxReplicas = 5
)

// SpansFor is how many spans a volume of that size has.
func SpansFor(sizeBytes int64) int {
	return int((sizeBytes + block.SpanBytes - 1) / block.SpanBytes)
}

// Group returns the group that holds chunk c; false if the volume has no span there.
func (v *VolumeMeta) Group(c block.Chunk) (block.GroupID, bool) {
	s := int(c.Span())
	if s >= len(v.Spans) || len(v.Spans[s]) == 0 {
		return 0, false
	}
	return v.Spans[s][int(c)%len(v.Spans[s])], true
}

// Groups returns each group of the volume once, in order of first use.
func (v *VolumeMeta) Groups() []block.GroupID {
	var out []block.GroupID
	seen := map[block.GroupID]bool{}
	for _, span := range v.Spans {
		for _, g := range span {
			if !seen[g] {
				seen[g] = true
				out = append(out, g)
			}
		}
	}
	return out
}

// ReplicaMeta is one replica of a group.
type ReplicaMeta struct {
	Node    block.NodeID    `json:"node"`
	Disk    block.DiskID    `json:"disk"`
	Replica block.ReplicaID `json:"replica"`
	// Created: the node has made it durable. From then on, a replica that its
	// node does not find on that disk is lost and must never be made again (C1).
	Created bool `json:"created,omitempty"`
	// Lost: its node did not find it. It votes no more.
	Lost bool `json:"lost,omitempty"`
	// Damaged: what its node found of it cannot be trusted (L4). It votes no more.
	Damaged bool `json:"damaged,omitempty"`
	// Joining: the group's leader makes it a member, in the place of those that
	// are Leaving (see ReplaceReplica). Given up: the leader sees to it that it is
	// none and never will be (see AbandonReplacement).
	Joining bool `json:"joining,omitempty"`
	Leaving bool `json:"leaving,omitempty"`
	GivenUp bool `json:"given_up,omitempty"`
}

// Dead tells whether the replica takes part in nothing any more, under this id.
func (r *ReplicaMeta) Dead() bool { return r.Lost || r.Damaged }

// GroupMeta is one Raft group.
type GroupMeta struct {
	V        int           `json:"v"`
	ID       block.GroupID `json:"id"`
	Era      uint16        `json:"era"`
	Replicas []ReplicaMeta `json:"replicas"`
	// ConfVersion is the Raft index of the entry that decided these members
	// (C2); 0 for those that the group began with.
	ConfVersion uint64 `json:"conf"`
	// LastReplica is the highest replica id given out, if above those of Replicas (C1).
	LastReplica block.ReplicaID `json:"last,omitempty"`
	// Birth is the members that the group began with, once they have changed: a
	// later replica begins there too, and learns the changes from the log.
	Birth map[block.ReplicaID]block.NodeID `json:"birth,omitempty"`
	// Removed are replicas that the group's leader found to be members no more,
	// for ever, and whose nodes have not said yet that their data is gone. What is
	// not listed is kept (S8).
	Removed []ReplicaMeta `json:"removed,omitempty"`
}

// MaxRemoved bounds GroupMeta.Removed: of more, the oldest stay on their disks.
const MaxRemoved = 16

// BirthMembers is the members that the group began with.
func (g *GroupMeta) BirthMembers() map[block.ReplicaID]block.NodeID {
	if len(g.Birth) > 0 {
		return g.Birth
	}
	members := make(map[block.ReplicaID]block.NodeID, len(g.Replicas))
	for _, r := range g.Replicas {
		members[r.Replica] = r.Node
	}
	return members
}

// Joining tells whether members are being replaced.
func (g *GroupMeta) Joining() bool {
	return slices.ContainsFunc(g.Replicas, func(r ReplicaMeta) bool { return r.Joining })
}

// Whole tells whether every member is as it should be, and none is replaced.
func (g *GroupMeta) Whole() bool {
	for i := range g.Replicas {
		if r := &g.Replicas[i]; r.Dead() || r.Joining || r.Leaving || !r.Created {
			return false
		}
	}
	return true
}

// Well is how many members the group has that are not dead, of how many.
func (g *GroupMeta) Well() (well, members int) {
	for i := range g.Replicas {
		if r := &g.Replicas[i]; !r.Joining {
			members++
			if !r.Dead() {
				well++
			}
		}
	}
	return well, members
}

// Created tells whether all replicas that the group counts on were acknowledged.
func (g *GroupMeta) Created() bool {
	for _, r := range g.Replicas {
		if !r.Created && !r.Joining {
			return false
		}
	}
	return true
}

// DiskMeta is one disk of a node.
type DiskMeta struct {
	ID            block.DiskID `json:"id"`
	CapacityBytes int64        `json:"capacity"`
	// Failed is final (L8).
	Failed bool `json:"failed,omitempty"`
	// Absent: known from before, but not among those that the node came up with.
	Absent bool `json:"absent,omitempty"`
}

// NodeMeta is one storage node, as it registered last.
type NodeMeta struct {
	V     int          `json:"v"`
	ID    block.NodeID `json:"id"`
	Addr  string       `json:"addr"`
	Zone  string       `json:"zone,omitempty"`
	Disks []DiskMeta   `json:"disks"`
}

// LiveMeta is the value of a node's liveness key.
type LiveMeta struct {
	V int `json:"v"`
	// Incarnation is drawn at each start of the process.
	Incarnation uint64 `json:"incarnation,string"`
	// Boot is the machine's boot id. Two processes of one boot that name the
	// same disks cannot both hold their locks: the newer one may replace the key
	// of the older.
	Boot  string         `json:"boot"`
	Addr  string         `json:"addr"`
	Disks []block.DiskID `json:"disks,omitempty"`
}

// OwnerMeta is the attachment of a volume. Its key hangs on the gateway's lease.
type OwnerMeta struct {
	V       int         `json:"v"`
	Gateway string      `json:"gateway"`
	Nonce   block.Nonce `json:"nonce,string"`
	Epoch   block.Epoch `json:"epoch"`
	// Addr is where the gateway's clients of that volume go, for error texts and
	// for peers.
	Addr string `json:"addr"`
	// Boot and Folder prove a self-replacement (F3): the machine's boot id and
	// the id of the data folder that the gateway holds locked. Empty Folder: no
	// proof is possible.
	Boot   string `json:"boot,omitempty"`
	Folder string `json:"folder,omitempty"`
}

// GatewayMeta is one live gateway.
type GatewayMeta struct {
	V           int    `json:"v"`
	ID          string `json:"id"`
	Incarnation uint64 `json:"incarnation,string"`
	Addr        string `json:"addr"` // gRPC
	NBD         string `json:"nbd,omitempty"`
	ISCSI       string `json:"iscsi,omitempty"`
	Boot        string `json:"boot,omitempty"`
	Folder      string `json:"folder,omitempty"`
}

// Leader is the value of the election key.
type Leader struct {
	V     int          `json:"v"`
	Node  block.NodeID `json:"node"`
	Nonce uint64       `json:"nonce,string"`
}

func encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic("meta: a catalog value does not encode: " + err.Error()) // no type here can fail
	}
	return b
}

// decode reads the value of kv and checks its format version, which at points to.
func decode(kv KV, into any, at *int) error {
	if len(kv.Value) > MaxValueBytes {
		return block.Errorf(block.Corrupt, "key %q: a value of %d bytes", kv.Key, len(kv.Value))
	}
	if err := json.NewDecoder(bytes.NewReader(kv.Value)).Decode(into); err != nil {
		return block.Wrap(block.Corrupt, err, "key %q does not decode", kv.Key)
	}
	if *at > Format {
		return block.Errorf(block.Unsupported, "key %q has format %d, this build knows up to %d: upgrade it", kv.Key, *at, Format)
	}
	if *at < 1 {
		return block.Errorf(block.Corrupt, "key %q has no format version", kv.Key)
	}
	return nil
}

// EncodeVolume returns the stored form of v.
func EncodeVolume(v VolumeMeta) []byte { v.V = Format; return encode(v) }

// DecodeVolume reads a volume and checks that it makes sense.
func DecodeVolume(kv KV) (v VolumeMeta, err error) {
	if err = decode(kv, &v, &v.V); err != nil {
		return VolumeMeta{}, err
	}
	bad := func(why string) (VolumeMeta, error) {
		return VolumeMeta{}, block.Errorf(block.Corrupt, "key %q: %s", kv.Key, why)
	}
	switch {
	case v.ID.IsZero():
		return bad("a volume without an id")
	case v.SizeBytes <= 0 || v.SizeBytes > MaxVolumeBytes || v.WantBytes < 0 || v.WantBytes > MaxVolumeBytes:
		return bad("a volume of an impossible size")
	case v.BlockSize != 512 && v.BlockSize != 4096:
		return bad("a volume of an unknown block size")
	case v.Replicas < 1 || v.Replicas > MaxReplicas:
		return bad("a volume of an impossible number of replicas")
	case v.State != Creating && v.State != Ready && v.State != Deleting:
		return bad("a volume in an unknown state")
	case len(v.Spans) > MaxSpans || v.State == Ready && len(v.Spans) < SpansFor(v.SizeBytes):
		return bad("the spans do not fit the size")
	}
	for _, span := range v.Spans {
		if len(span) == 0 || len(span) > MaxWidth {
			return bad("a span of an impossible width")
		}
		for _, g := range span {
			if g == 0 {
				return bad("a span names group 0")
			}
		}
	}
	return v, nil
}

// EncodeGroup returns the stored form of g.
func EncodeGroup(g GroupMeta) []byte { g.V = Format; return encode(g) }

// DecodeGroup reads a group and checks that it makes sense.
func DecodeGroup(kv KV) (g GroupMeta, err error) {
	if err = decode(kv, &g, &g.V); err != nil {
		return GroupMeta{}, err
	}
	bad := func(why string) (GroupMeta, error) {
		return GroupMeta{}, block.Errorf(block.Corrupt, "key %q: %s", kv.Key, why)
	}
	if g.ID == 0 || len(g.Replicas) == 0 || len(g.Replicas) > 4*MaxReplicas {
		return bad("a group without an id, or with an impossible number of replicas")
	}
	seen := map[block.ReplicaID]bool{}
	for _, r := range g.Replicas {
		if r.Replica == 0 || r.Node == 0 || r.Disk.IsZero() || seen[r.Replica] {
			return bad("a replica without an id, a node or a disk, or named twice")
		}
		seen[r.Replica] = true
	}
	if len(g.Removed) > MaxRemoved {
		return bad("too many removed replicas")
	}
	for _, r := range g.Removed {
		if r.Replica == 0 || seen[r.Replica] {
			return bad("a removed replica without an id, or that is a member")
		}
	}
	return g, nil
}

// EncodeNode returns the stored form of n.
func EncodeNode(n NodeMeta) []byte { n.V = Format; return encode(n) }

// DecodeNode reads a node and checks that it makes sense.
func DecodeNode(kv KV) (n NodeMeta, err error) {
	if err = decode(kv, &n, &n.V); err != nil {
		return NodeMeta{}, err
	}
	if n.ID == 0 || n.ID > MaxNodeID {
		return NodeMeta{}, block.Errorf(block.Corrupt, "key %q: a node without a legal id", kv.Key)
	}
	for _, d := range n.Disks {
		if d.ID.IsZero() || d.CapacityBytes < 0 {
			return NodeMeta{}, block.Errorf(block.Corrupt, "key %q: a disk without an id, or of an impossible size", kv.Key)
		}
	}
	return n, nil
}

// DecodeLive reads the value of a liveness key.
func DecodeLive(kv KV) (l LiveMeta, err error) {
	err = decode(kv, &l, &l.V)
	return l, err
}

// DecodeOwner reads an owner.
func DecodeOwner(kv KV) (o OwnerMeta, err error) {
	err = decode(kv, &o, &o.V)
	return o, err
}

// DecodeGateway reads a gateway.
func DecodeGateway(kv KV) (g GatewayMeta, err error) {
	err = decode(kv, &g, &g.V)
	return g, err
}

// DecodeCluster reads the cluster's value.
func DecodeCluster(kv KV) (c ClusterMeta, err error) {
	if err = decode(kv, &c, &c.V); err == nil && c.ID.IsZero() {
		err = block.Errorf(block.Corrupt, "key %q: a cluster without an id", kv.Key)
	}
	return c, err
}

// DecodeLeader reads the value of the election key.
func DecodeLeader(kv KV) (l Leader, err error) {
	err = decode(kv, &l, &l.V)
	return l, err
}

func decodeCounter(kv KV) (uint64, error) {
	if !kv.Exists() {
		return 0, nil
	}
	n, err := strconv.ParseUint(string(kv.Value), 10, 64)
	if err != nil {
		return 0, block.Errorf(block.Corrupt, "key %q: %.40q is not a number", kv.Key, kv.Value)
	}
	return n, nil
}

func encodeCounter(n uint64) []byte { return strconv.AppendUint(nil, n, 10) }
