package main

import (
	"errors"
	"net"
	"net/url"
	"regexp"
	"strconv"
	"strings"

	"firn.io/firn/internal/block"
)

// check refuses addresses that nothing can listen on, before anything is done.
func (f *frontFlags) check() error {
	nbd := f.nbd
	if strings.HasPrefix(nbd, "unix:") {
		nbd = ""
	}
	return errors.Join(checkAddress("--nbd", nbd), checkAddress("--api", f.api), checkAddress("--http", f.http))
}

// checkAddress refuses what is no HOST:PORT; "" is left to others.
func checkAddress(flag, addr string) error {
	if addr == "" {
		return nil
	}
	if _, err := strconv.ParseUint(addr, 10, 16); err == nil {
		return block.Errorf(block.Invalid, "%s %s: write it as HOST:PORT, such as 127.0.0.1:%s", flag, addr, addr)
	}
	_, port, err := net.SplitHostPort(addr)
	if err != nil && flag == "--nbd" {
		return nil // a host without a port has NBD's
	}
	if err != nil {
		return block.Errorf(block.Invalid, "%s %s: write it as HOST:PORT", flag, addr)
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return block.Errorf(block.Invalid, "%s %s: %q is no port; use 1 to 65535", flag, addr, port)
	}
	return nil
}

// check refuses what cannot be an etcd.
func (e *etcdFlags) check() error {
	for _, text := range strings.Split(e.endpoints, ",") {
		text = strings.TrimSpace(text)
		host := text
		if scheme, _, ok := strings.Cut(text, "://"); ok {
			u, err := url.Parse(text)
			if err != nil || scheme != "http" && scheme != "https" {
				return block.Errorf(block.Invalid, "--etcd %s: write it as http://HOST:2379 or https://HOST:2379", text)
			}
			host = u.Host
		}
		h, port, err := net.SplitHostPort(host)
		if _, bad := strconv.ParseUint(port, 10, 16); err != nil || bad != nil || h == "" {
			return block.Errorf(block.Invalid, "--etcd %s: write it as http://HOST:2379, with the port; several are separated by commas", text)
		}
	}
	return nil
}

// What the libraries of the command line say, and what a person is told.
var humanTexts = []struct {
	found *regexp.Regexp
	say   string
}{
	{regexp.MustCompile(`strconv\.Parse(?:Int|Uint): parsing ".*": value out of range`), "that number is out of range"},
	{regexp.MustCompile(`strconv\.Parse(?:Int|Uint): parsing ".*": invalid syntax`), "a whole number is needed"},
	{regexp.MustCompile(`strconv\.ParseBool: parsing ".*": invalid syntax`), "use true or false"},
	{regexp.MustCompile(`time: (?:invalid|missing unit in|unknown unit ".*" in) duration ".*"`), "write it as 30s, 5m or 1h"},
	{regexp.MustCompile(`accepts (\d+) arg\(s\), received (\d+)`), "it takes $1 arguments, $2 were given"},
	{regexp.MustCompile(`requires at least (\d+) arg\(s\), only received (\d+)`), "it takes at least $1 arguments, $2 were given"},
	{regexp.MustCompile(`accepts at most (\d+) arg\(s\), received (\d+)`), "it takes at most $1 arguments, $2 were given"},
}

// human is the text of an error of the command line.
func human(err error) string {
	text := err.Error()
	for _, h := range humanTexts {
		text = h.found.ReplaceAllString(text, h.say)
	}
	return strings.NewReplacer("takes 1 arguments", "takes 1 argument", "least 1 arguments", "least 1 argument", ", 1 were given", ", 1 was given", ", 0 were given", ", none was given").Replace(text)
}
