package meta

import (
	"fmt"
	"strconv"
	"strings"

	"firn.io/firn/internal/block"
)

// The keys. Numbers are decimal, ids have the 8-4-4-4-12 form.
const (
	// Root is the prefix of all keys of Firn.
	Root = "/firn/v1/"
	// ClusterKey holds ClusterMeta.
	ClusterKey = Root + "cluster"
	// ElectionKey holds the elected coordinator, under its lease.
	ElectionKey = Root + "election"
	// GroupCounterKey holds the highest group id that was ever given out.
	GroupCounterKey = Root + "counter/group"

	NodesPrefix    = Root + "nodes/"    // <node id>: NodeMeta
	LivePrefix     = Root + "live/"     // <node id>: LiveMeta, leased
	GroupsPrefix   = Root + "groups/"   // <group id>: GroupMeta
	VolumesPrefix  = Root + "vol/"      // <volume id>: VolumeMeta
	NamesPrefix    = Root + "name/"     // <volume name>: the volume's id
	OwnersPrefix   = Root + "owner/"    // <volume id>: OwnerMeta, leased
	GatewaysPrefix = Root + "gateways/" // <gateway id>: GatewayMeta, leased

	ReservationsPrefix = Root + "reservations/" // <volume id>: persistent reservations
)

// NodeKey is the key of a node's NodeMeta.
func NodeKey(id block.NodeID) string { return NodesPrefix + strconv.FormatUint(uint64(id), 10) }

// LiveKey is the key that exists while a node lives.
func LiveKey(id block.NodeID) string { return LivePrefix + strconv.FormatUint(uint64(id), 10) }

// GroupKey is the key of a group's GroupMeta.
func GroupKey(id block.GroupID) string { return GroupsPrefix + strconv.FormatUint(uint64(id), 10) }

// VolumeKey is the key of a volume's VolumeMeta.
func VolumeKey(id block.VolumeID) string { return VolumesPrefix + id.String() }

// NameKey is the key that reserves a volume's name.
func NameKey(name string) string { return NamesPrefix + name }

// OwnerKey is the key that exists while a volume is attached.
func OwnerKey(id block.VolumeID) string { return OwnersPrefix + id.String() }

// ReservationsKey is the key of a volume's persistent reservations.
func ReservationsKey(id block.VolumeID) string { return ReservationsPrefix + id.String() }

// GatewayKey is the key that exists while a gateway lives.
func GatewayKey(id string) string { return GatewaysPrefix + id }

// ParseNodeKey returns the node of a NodeKey or a LiveKey.
func ParseNodeKey(key string) (block.NodeID, error) {
	s := strings.TrimPrefix(strings.TrimPrefix(key, NodesPrefix), LivePrefix)
	n, err := strconv.ParseUint(s, 10, 31)
	if err != nil || n == 0 {
		return 0, block.Errorf(block.Corrupt, "key %q names no node", key)
	}
	return block.NodeID(n), nil
}

// ParseGroupKey returns the group of a GroupKey.
func ParseGroupKey(key string) (block.GroupID, error) {
	n, err := strconv.ParseUint(strings.TrimPrefix(key, GroupsPrefix), 10, 64)
	if err != nil || n == 0 {
		return 0, block.Errorf(block.Corrupt, "key %q names no group", key)
	}
	return block.GroupID(n), nil
}

// ParseVolumeKey returns the volume of a VolumeKey or an OwnerKey.
func ParseVolumeKey(key string) (block.VolumeID, error) {
	id, err := block.ParseUUID(strings.TrimPrefix(strings.TrimPrefix(key, VolumesPrefix), OwnersPrefix))
	if err != nil {
		return block.VolumeID{}, block.Wrap(block.Corrupt, err, "key %q names no volume", key)
	}
	return id, nil
}

// Bounds of names.
const (
	// MaxVolumeName bounds a volume's name, in bytes: it fits a DNS label, and
	// with the prefix iqn.2026-11.io.firn: an iSCSI name.
	MaxVolumeName = 63
	// MaxGatewayID bounds a gateway's id.
	MaxGatewayID = 63
	// MaxNodeID bounds a node's id.
	MaxNodeID = 1<<31 - 1
)

// CheckVolumeName tells why name is not a legal volume name (kind Invalid):
// 1 to 63 characters of a-z, 0-9, '-' and '.', with a letter or a digit at both
// ends and on both sides of each '.'. So a name is at once an NBD export name,
// the end of an IQN (RFC 3722 knows no upper case and no underscore), a file
// name and a DNS name.
func CheckVolumeName(name string) error { return checkName("volume name", name, MaxVolumeName) }

// CheckGatewayID tells why id is not a legal gateway id; the rules are those of
// volume names.
func CheckGatewayID(id string) error { return checkName("gateway id", id, MaxGatewayID) }

func checkName(what, name string, limit int) error {
	bad := func(why string, args ...any) error {
		return block.Errorf(block.Invalid, "%s %.80q: %s; use 1 to %d of a-z, 0-9, '-' and '.'", what, name, fmt.Sprintf(why, args...), limit)
	}
	if name == "" {
		return bad("it is empty")
	}
	if len(name) > limit {
		return bad("it has %d characters", len(name))
	}
	alnum := func(c byte) bool { return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' }
	for i, letter := range name {
		c := name[i]
		switch {
		case alnum(c):
		case c >= 'A' && c <= 'Z':
			return bad("upper case is not allowed")
		case c != '-' && c != '.':
			return bad("%q is not allowed", letter)
		case i == 0 || i == len(name)-1:
			return bad("it must begin and end with a letter or a digit")
		case c == '.' && !(alnum(name[i-1]) && alnum(name[i+1])), c == '-' && name[i-1] == '.':
			return bad("a '.' must stand between letters or digits")
		}
	}
	return nil
}
