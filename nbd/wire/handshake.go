package wire

import (
	"bytes"
	"encoding/binary"
	"strings"
	"unicode/utf8"
)

var be = binary.BigEndian

// BaseAllocation is the name of the one metadata context that this package
// knows.
const BaseAllocation = "base:allocation"

// maxQueries bounds the queries of one metadata context option.
const maxQueries = 1024

// AppendGreeting appends what a server says first.
func AppendGreeting(dst []byte, f HandshakeFlags) []byte {
	dst = be.AppendUint64(dst, magicNBD)
	dst = be.AppendUint64(dst, magicOption)
	return be.AppendUint16(dst, uint16(f))
}

// ParseGreeting reads the GreetingLen bytes that a newstyle server says first.
func ParseGreeting(p []byte) (HandshakeFlags, error) {
	if len(p) != GreetingLen || be.Uint64(p) != magicNBD || be.Uint64(p[8:]) != magicOption {
		return 0, malformed("not the greeting of a newstyle server")
	}
	return HandshakeFlags(be.Uint16(p[16:])), nil
}

// AppendClientFlags appends the client's answer to a greeting.
func AppendClientFlags(dst []byte, f ClientFlags) []byte { return be.AppendUint32(dst, uint32(f)) }

// ParseClientFlags reads ClientFlagsLen bytes and refuses unknown flags.
func ParseClientFlags(p []byte) (ClientFlags, error) {
	if len(p) != ClientFlagsLen {
		return 0, malformed("client flags of %d bytes", len(p))
	}
	f := ClientFlags(be.Uint32(p))
	if f&^(ClientFixedNewstyle|ClientNoZeroes) != 0 {
		return 0, malformed("unknown client flags %#x", uint32(f))
	}
	return f, nil
}

// AppendOption appends an option with its data.
func AppendOption(dst []byte, o Option, data []byte) []byte {
	dst = be.AppendUint64(dst, magicOption)
	dst = be.AppendUint32(dst, uint32(o))
	dst = be.AppendUint32(dst, uint32(len(data)))
	return append(dst, data...)
}

// ParseOptionHeader reads OptionHeaderLen bytes. n is the length of the data
// that the peer claims will follow; nothing has been checked about it.
func ParseOptionHeader(p []byte) (o Option, n uint32, err error) {
	if len(p) != OptionHeaderLen || be.Uint64(p) != magicOption {
		return 0, 0, malformed("not an option")
	}
	return Option(be.Uint32(p[8:])), be.Uint32(p[12:]), nil
}

// AppendOptReply appends an answer to option o.
func AppendOptReply(dst []byte, o Option, r OptReply, data []byte) []byte {
	dst = be.AppendUint64(dst, magicOptReply)
	dst = be.AppendUint32(dst, uint32(o))
	dst = be.AppendUint32(dst, uint32(r))
	dst = be.AppendUint32(dst, uint32(len(data)))
	return append(dst, data...)
}

// ParseOptReplyHeader reads OptReplyHeaderLen bytes. n is an unchecked claim.
func ParseOptReplyHeader(p []byte) (o Option, r OptReply, n uint32, err error) {
	if len(p) != OptReplyHeaderLen || be.Uint64(p) != magicOptReply {
		return 0, 0, 0, malformed("not a reply to an option")
	}
	return Option(be.Uint32(p[8:])), OptReply(be.Uint32(p[12:])), be.Uint32(p[16:]), nil
}

// AppendExportName appends a server's answer to EXPORT_NAME.
func AppendExportName(dst []byte, size uint64, f ExportFlags, pad bool) []byte {
	dst = be.AppendUint64(dst, size)
	dst = be.AppendUint16(dst, uint16(f))
	if pad {
		dst = append(dst, make([]byte, ExportNamePad)...)
	}
	return dst
}

// AppendInfoRequest appends the data of INFO and GO.
func AppendInfoRequest(dst []byte, name string, want ...InfoType) []byte {
	dst = appendString(dst, name)
	dst = be.AppendUint16(dst, uint16(len(want)))
	for _, t := range want {
		dst = be.AppendUint16(dst, uint16(t))
	}
	return dst
}

// InfoRequest is the data of INFO and GO.
type InfoRequest struct {
	Name string
	Want []InfoType
}

// Wants tells whether the client asked for t.
func (r *InfoRequest) Wants(t InfoType) bool {
	for _, w := range r.Want {
		if w == t {
			return true
		}
	}
	return false
}

// ParseInfoRequest reads the data of INFO and GO.
func ParseInfoRequest(p []byte) (r InfoRequest, err error) {
	if r.Name, p, err = cutString(p, "export name"); err != nil {
		return r, err
	}
	if len(p) < 2 || len(p) != 2+2*int(be.Uint16(p)) {
		return r, malformed("the list of information requests does not fill the option")
	}
	for p = p[2:]; len(p) > 0; p = p[2:] {
		r.Want = append(r.Want, InfoType(be.Uint16(p)))
	}
	return r, nil
}

// ParseName checks the data of EXPORT_NAME: a bare name.
func ParseName(p []byte) (string, error) { return checkString(p, "export name") }

// AppendInfoExport appends the data of a RepInfo of type InfoExport.
func AppendInfoExport(dst []byte, size uint64, f ExportFlags) []byte {
	dst = be.AppendUint16(dst, uint16(InfoExport))
	dst = be.AppendUint64(dst, size)
	return be.AppendUint16(dst, uint16(f))
}

// AppendInfoText appends the data of a RepInfo of type InfoName or
// InfoDescription. Text beyond MaxName is cut.
func AppendInfoText(dst []byte, t InfoType, text string) []byte {
	dst = be.AppendUint16(dst, uint16(t))
	return append(dst, Cut(text)...)
}

// AppendInfoBlockSize appends the data of a RepInfo of type InfoBlockSize.
func AppendInfoBlockSize(dst []byte, b BlockSizes) []byte {
	dst = be.AppendUint16(dst, uint16(InfoBlockSize))
	dst = be.AppendUint32(dst, b.Min)
	dst = be.AppendUint32(dst, b.Preferred)
	return be.AppendUint32(dst, b.Max)
}

// BlockSizes are the constraints of an export, in bytes.
type BlockSizes struct{ Min, Preferred, Max uint32 }

// InfoReply is one RepInfo, as a client reads it; the fields of its Type are set.
type InfoReply struct {
	Type   InfoType
	Size   uint64
	Flags  ExportFlags
	Text   string
	Blocks BlockSizes
}

// ParseInfoReply reads the data of a RepInfo. Unknown types give only Type.
func ParseInfoReply(p []byte) (r InfoReply, err error) {
	if len(p) < 2 {
		return r, malformed("information of %d bytes", len(p))
	}
	r.Type, p = InfoType(be.Uint16(p)), p[2:]
	switch r.Type {
	case InfoExport:
		if len(p) != 10 {
			return r, malformed("export information of %d bytes", len(p))
		}
		r.Size, r.Flags = be.Uint64(p), ExportFlags(be.Uint16(p[8:]))
	case InfoName, InfoDescription:
		r.Text, err = checkString(p, "information")
	case InfoBlockSize:
		if len(p) != 12 {
			return r, malformed("block sizes of %d bytes", len(p))
		}
		r.Blocks = BlockSizes{be.Uint32(p), be.Uint32(p[4:]), be.Uint32(p[8:])}
	}
	return r, err
}

// AppendServer appends the data of a RepServer.
func AppendServer(dst []byte, name, description string) []byte {
	dst = appendString(dst, name)
	return append(dst, Cut(description)...)
}

// ParseServer reads the data of a RepServer.
func ParseServer(p []byte) (name, description string, err error) {
	if name, p, err = cutString(p, "export name"); err != nil {
		return "", "", err
	}
	description, err = checkString(p, "description")
	return name, description, err
}

// MetaRequest is the data of LIST_META_CONTEXT and SET_META_CONTEXT.
type MetaRequest struct {
	Export  string
	Queries []string
}

// AppendMetaRequest appends the data of LIST_META_CONTEXT or SET_META_CONTEXT.
func AppendMetaRequest(dst []byte, export string, queries ...string) []byte {
	dst = appendString(dst, export)
	dst = be.AppendUint32(dst, uint32(len(queries)))
	for _, q := range queries {
		dst = appendString(dst, q)
	}
	return dst
}

// ParseMetaRequest reads the data of LIST_META_CONTEXT or SET_META_CONTEXT.
func ParseMetaRequest(p []byte) (r MetaRequest, err error) {
	if r.Export, p, err = cutString(p, "export name"); err != nil {
		return r, err
	}
	if len(p) < 4 {
		return r, malformed("no number of queries")
	}
	n := be.Uint32(p)
	if n > maxQueries {
		return r, malformed("%d queries; %d are allowed", n, maxQueries)
	}
	p = p[4:]
	for range n {
		var q string
		if q, p, err = cutString(p, "query"); err != nil {
			return r, err
		}
		r.Queries = append(r.Queries, q)
	}
	if len(p) != 0 {
		return r, malformed("%d bytes after the last query", len(p))
	}
	return r, nil
}

// MatchesBaseAllocation tells whether a query selects base:allocation; list
// says that it comes from LIST_META_CONTEXT, where a namespace alone selects
// all in it.
func MatchesBaseAllocation(query string, list bool) bool {
	return query == BaseAllocation || list && query == BaseAllocation[:strings.IndexByte(BaseAllocation, ':')+1]
}

// AppendMetaContext appends the data of a RepMetaContext.
func AppendMetaContext(dst []byte, id uint32, name string) []byte {
	dst = be.AppendUint32(dst, id)
	return append(dst, Cut(name)...)
}

// ParseMetaContext reads the data of a RepMetaContext.
func ParseMetaContext(p []byte) (id uint32, name string, err error) {
	if len(p) < 4 {
		return 0, "", malformed("metadata context of %d bytes", len(p))
	}
	name, err = checkString(p[4:], "metadata context")
	return be.Uint32(p), name, err
}

// SessionLen is the length of the data of OptSession.
const SessionLen = 16 + 4 + 8

// Session says which device of a client a connection belongs to, so that a
// server knows a connection that takes the place of older ones.
type Session struct {
	// ID names the device; random, and known to the client alone.
	ID [16]byte
	// Connection numbers those that the device uses side by side.
	Connection uint32
	// Incarnation rises when all connections are made anew. A connection takes
	// the place of those with a lower Incarnation, and of that with its own
	// Incarnation and Connection.
	Incarnation uint64
}

// AppendSession appends the data of OptSession.
func AppendSession(dst []byte, s Session) []byte {
	dst = append(dst, s.ID[:]...)
	dst = be.AppendUint32(dst, s.Connection)
	return be.AppendUint64(dst, s.Incarnation)
}

// ParseSession reads the data of OptSession. An ID of zeros is none.
func ParseSession(p []byte) (s Session, err error) {
	if len(p) != SessionLen {
		return s, malformed("session of %d bytes", len(p))
	}
	copy(s.ID[:], p)
	s.Connection, s.Incarnation = be.Uint32(p[16:]), be.Uint64(p[20:])
	if s.ID == [16]byte{} {
		return s, malformed("session without an id")
	}
	return s, nil
}

// Cut shortens text to MaxName bytes of whole characters, without zero bytes:
// what a peer must accept as a string.
func Cut(text string) string {
	text = strings.ToValidUTF8(strings.ReplaceAll(text, "\x00", " "), "?")
	if len(text) <= MaxName {
		return text
	}
	n := MaxName
	for n > 0 && !utf8.RuneStart(text[n]) {
		n--
	}
	return text[:n]
}

func appendString(dst []byte, s string) []byte {
	dst = be.AppendUint32(dst, uint32(len(s)))
	return append(dst, s...)
}

func cutString(p []byte, what string) (s string, rest []byte, err error) {
	if len(p) < 4 || uint64(be.Uint32(p)) > uint64(len(p)-4) {
		return "", nil, malformed("%s is longer than the option", what)
	}
	n := be.Uint32(p)
	s, err = checkString(p[4:4+n], what)
	return s, p[4+n:], err
}

func checkString(p []byte, what string) (string, error) {
	switch {
	case len(p) > MaxName:
		return "", malformed("%s of %d bytes; %d are allowed", what, len(p), MaxName)
	case !utf8.Valid(p) || bytes.IndexByte(p, 0) >= 0:
		return "", malformed("%s is not text", what)
	}
	return string(p), nil
}
