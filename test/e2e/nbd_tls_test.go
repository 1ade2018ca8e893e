package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// nbdAuthority signs certificates into files that are named as gnutls' users
// (libnbd, QEMU, nbdkit) name them: ca-cert.pem, client-cert.pem, ...
type nbdAuthority struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	der  []byte
}

func newNBDAuthority(t testing.TB) *nbdAuthority {
	a := &nbdAuthority{t: t}
	a.der, a.key = a.sign("authority", true)
	cert, err := x509.ParseCertificate(a.der)
	if err != nil {
		t.Fatal(err)
	}
	a.cert = cert
	return a
}

func (a *nbdAuthority) sign(name string, ca bool) (der []byte, key *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, IsCA: ca, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	parent, signer := a.cert, a.key
	if ca {
		c.KeyUsage, c.ExtKeyUsage, c.IPAddresses = x509.KeyUsageCertSign, nil, nil
		parent, signer = c, key
	}
	if der, err = x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer); err != nil {
		a.t.Fatal(err)
	}
	return der, key
}

// folder makes a folder for an owner ("client", "server") called name.
func (a *nbdAuthority) folder(owner, name string) string {
	a.t.Helper()
	dir := a.t.TempDir()
	der, key := a.sign(name, false)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	for file, b := range map[string]*pem.Block{
		"ca-cert.pem": {Type: "CERTIFICATE", Bytes: a.der}, owner + "-cert.pem": {Type: "CERTIFICATE", Bytes: der}, owner + "-key.pem": {Type: "PRIVATE KEY", Bytes: keyDER},
	} {
		if err := os.WriteFile(filepath.Join(dir, file), pem.EncodeToMemory(b), 0o600); err != nil {
			a.t.Fatal(err)
		}
	}
	return dir
}

// TestNBDTLS: gnutls' clients and ours agree, those without a certificate, or
// with one that lets them elsewhere, are refused, and nobody gets by in the clear.
func TestNBDTLS(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	a := newNBDAuthority(t)
	server, alice, bob := a.folder("server", "127.0.0.1"), a.folder("client", "alice"), a.folder("client", "bob")
	stranger := newNBDAuthority(t).folder("client", "alice")
	s := up(t, dir+"/data", "--volume", "hers=64M", "--volume", "both=64M", "--nbd-tls-cert", server+"/server-cert.pem", "--nbd-tls-key", server+"/server-key.pem",
		"--nbd-tls-ca", server+"/ca-cert.pem", "--nbd-allow", "hers=alice", "--nbd-allow", "both=alice", "--nbd-allow", "both=bob")
	uri := func(volume, certificates string) string {
		return "nbds://" + s.NBD + "/" + volume + "?tls-certificates=" + certificates
	}
	image(t, dir+"/in.img", 64<<20, 7)
	run(t, "nbdcopy", "--connections=2", dir+"/in.img", uri("hers", alice))
	run(t, "nbdcopy", uri("hers", alice), dir+"/out.img")
	run(t, "cmp", dir+"/in.img", dir+"/out.img")

	host, port, _ := strings.Cut(s.NBD, ":")
	qemu := []string{"--object", "tls-creds-x509,id=tls,endpoint=client,dir=" + alice, "--image-opts", "driver=nbd,host=" + host + ",port=" + port + ",export=both,tls-creds=tls"}
	run(t, "qemu-io", append(qemu, "-c", "write -P 0x5a 1M 2M", "-c", "flush", "-c", "read -P 0x5a 1M 2M", "-c", "read -P 0 0 1M")...)
	run(t, "qemu-img", append(append([]string{"convert"}, qemu...), "-O", "raw", dir+"/both.img")...)
	run(t, "qemu-io", "-f", "raw", "-c", "read -P 0x5a 1M 2M", dir+"/both.img")
	// nbdkit's own client, for those that have no TLS.
	run(t, "nbdkit", "-U", "-", "nbd", "hostname="+host, "port="+port, "export=hers", "tls=require", "tls-certificates="+alice, "--run", "nbdcopy $uri "+dir+"/again.img && cmp "+dir+"/in.img "+dir+"/again.img")

	for _, c := range []struct{ name, uri, want string }{
		{"in the clear", s.uri("hers"), "not supported"},
		{"another's volume", uri("hers", bob), "hers"},
		{"another authority", uri("hers", stranger), ""},
	} {
		r := try(t, "nbdinfo", c.uri)
		if r.exit == 0 || !strings.Contains(strings.ToLower(r.stderr), c.want) {
			t.Errorf("%s: exit %d, %s%s", c.name, r.exit, r.stdout, r.stderr)
		}
	}
	list := run(t, "nbdinfo", "--list", uri("", bob))
	if !strings.Contains(list, `export="both"`) || strings.Contains(list, `export="hers"`) {
		t.Errorf("bob is shown %s", list)
	}
	run(t, "nbdinfo", "--size", uri("both", bob))
}
